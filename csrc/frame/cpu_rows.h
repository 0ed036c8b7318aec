// The vectors of a call on the CPU, chunk by chunk: read where they lie, or converted and drawn into scratch.
#pragma once

#include <cstdlib>
#include <new>
#include <type_traits>

#include "frame/cpu_kernels.h"

namespace marquardt {

// Room for the rows of one chunk that are not read in place; one per thread and call.
template <class T>
class Scratch {
 public:
  explicit Scratch(int buffers) : storage_(buffers == 0 ? 0 : static_cast<size_t>(buffers) * kChunk + 64 / sizeof(T)) {
    const auto address = reinterpret_cast<uintptr_t>(storage_.get());
    first_ = storage_.get() + ((64 - address % 64) % 64) / sizeof(T);
  }
  T* buffer(int i) const { return first_ + static_cast<int64_t>(i) * kChunk; }

 private:
  struct Storage {
    explicit Storage(size_t count) : data(count == 0 ? nullptr : static_cast<T*>(std::malloc(count * sizeof(T)))) {
      if (data == nullptr && count > 0) throw std::bad_alloc();
    }
    ~Storage() { std::free(data); }
    Storage(const Storage&) = delete;
    Storage& operator=(const Storage&) = delete;
    T* get() const { return data; }
    T* data;
  };
  Storage storage_;
  T* first_;
};

template <class T>
constexpr DType dtype_of() {
  return std::is_same_v<T, double> ? DType::f64 : DType::f32;
}

template <class T>
struct VectorReader {
  const FrameCall& call;
  const TypedFrameKernels<T>& kernels;

  bool in_place(int j) const { return j < call.streams && call.stream[j].dtype == dtype_of<T>(); }

  // Vector j of sample b, from `begin` on for n elements: in place, or converted or drawn into `buffer`.
  const T* read(int j, int64_t b, int64_t begin, int64_t n, T* buffer) const {
    if (j < call.streams) {
      const Stream& s = call.stream[j];
      const auto* bytes = static_cast<const char*>(s.data) + (b * s.batch_stride + begin) * size_of(s.dtype);
      if (s.dtype == dtype_of<T>()) return reinterpret_cast<const T*>(bytes);
      kernels.load(s.dtype, bytes, buffer, n);
    } else if (call.ones && j == call.streams) {
      for (int64_t i = 0; i < n; ++i) buffer[i] = T(1);
    } else {
      const int64_t* seed = call.seed + b * call.seed_stride;
      const int64_t first = call.seed_stride == 0 ? b * call.size + begin : begin;
      kernels.noise(static_cast<uint64_t>(seed[0]), static_cast<uint64_t>(seed[1]), static_cast<uint64_t>(first),
                    buffer, n);
    }
    return buffer;
  }
};

}  // namespace marquardt
