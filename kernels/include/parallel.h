// How a kernel spreads work: the host (ONNX Runtime's pool, the bindings' own pool, a test) passes a callback.
// A kernel's result never depends on how many threads there are or on which thread runs which task.
#pragma once

namespace skerry {

inline constexpr int kMostStreams = 2;

struct Parallel {
  using Task = void (*)(void* argument, int index);

  // Calls task(argument, i) once for each i in [0, count), in any order, and returns when all are done. Null: serial.
  void (*run)(void* context, int count, Task task, void* argument) = nullptr;
  void* context = nullptr;
  int threads = 1;  // a hint: how many tasks can be expected to run at once
  // Multiply-adds below which handing work over costs more than it saves: waking a parked pool takes some 20 us.
  double serial_work = 1.0e6;
  // Says where thread i of the region to come will begin to read: at begins[i * streams] and the streams - 1 after it.
  // A host whose steps repeat has waiting threads fetch what came next last time. Null: nobody listens.
  void (*announce)(void* context, const void* const* begins, int streams) = nullptr;
  // Where the calling thread began to read, last time, in the region after this one; null: nobody knows.
  const void* (*next)(void* context) = nullptr;

  void operator()(int count, Task task, void* argument) const {
    if (run == nullptr || threads <= 1 || count <= 1) {
      for (int i = 0; i < count; ++i) task(argument, i);
    } else {
      run(context, count, task, argument);
    }
  }
};

}  // namespace skerry
