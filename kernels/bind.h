// What the files that bind share: arrays with checked shapes, and a segment of a product.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <tuple>

#include "include/launch.h"
#include "include/matmul_block.h"

namespace skerry::bind {

namespace nb = nanobind;

template <class T>
using In = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <class T>
using InOut = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<nb::numpy, T>;

inline void expect(const char* name, size_t found, size_t wanted) {
  if (found == wanted) return;
  throw std::invalid_argument(std::string(name) + " is " + std::to_string(found) + ", expected " +
                              std::to_string(wanted));
}

inline void expect_none(const std::string& problem) {
  if (!problem.empty()) throw std::invalid_argument(problem);
}

template <class T>
const T* checked(const char* name, const In<T>& array, std::initializer_list<size_t> shape) {
  if (array.ndim() != shape.size()) expect((std::string("dimensions of ") + name).c_str(), array.ndim(), shape.size());
  size_t axis = 0;
  for (const size_t wanted : shape) {
    if (array.shape(axis) != wanted) {
      const std::string what = "axis " + std::to_string(axis) + " of " + name;
      expect(what.c_str(), array.shape(axis), wanted);
    }
    ++axis;
  }
  return array.data();
}

// nanobind has no C++ type of halves: their type is checked by hand.
using HalfTensor = nb::ndarray<nb::c_contig, nb::device::cpu, nb::ro>;

inline void expect_adapters(const HalfTensor& values) {
  if (values.dtype() != nb::dlpack::dtype{2, 16, 1}) throw std::invalid_argument("adapters are not float16");
  expect("dimensions of adapters", values.ndim(), 3);
}

// weight, rows, format, bias (or None)
using Segment = std::tuple<In<uint8_t>, int64_t, int, nb::object>;

BlockSegment block_segment(const Segment& given, size_t width);

// Adds the class Program to the module.
void bind_program(nb::module_& m);
// Add the plans of GPU kernels.
void bind_cuda(nb::module_& m);
void bind_sample_cuda(nb::module_& m);

// kernel, grid, block, shared_bytes, together, params
nb::tuple as_tuple(const Launch& one);

}  // namespace skerry::bind
