// A growing block of memory, aligned to a cache line, kept by its thread.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace skerry {

class Scratch {
 public:
  float* get(int64_t floats) {
    if (floats > size_) {
      size_ = floats + floats / 4;
      data_.reset(static_cast<float*>(::operator new[](sizeof(float) * size_, std::align_val_t{64})));
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  std::unique_ptr<float[], Free> data_;
  int64_t size_ = 0;
};

}  // namespace skerry
