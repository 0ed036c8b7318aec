// The vectors of a call on the CPU, chunk by chunk: read where they lie, or converted and drawn into scratch.
#pragma once

#include <cstdlib>
#include <new>
#include <type_traits>
#include <vector>

#include "frame/cpu_kernels.h"

namespace marquardt {

// Room for the rows of one chunk that are not read in place; one per thread and call. Taken when it is first asked for:
// most calls read and write everything where it lies.
template <class T>
class Scratch {
 public:
  explicit Scratch(int buffers) : buffers_(buffers) {}
  ~Scratch() {
    std::free(storage_);
    std::free(noise_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* buffer(int i) const {
    if (first_ == nullptr) take();
    return first_ + static_cast<int64_t>(i) * kChunk;
  }

  // From here on the noise of one sample of `size` elements is kept between its sweeps.
  void keep_noise(int64_t size) const {
    const auto chunks = static_cast<size_t>((size + kChunk - 1) / kChunk);
    if (noise_ == nullptr) noise_ = static_cast<T*>(std::malloc(chunks * kChunk * sizeof(T)));
    if (noise_ == nullptr) throw std::bad_alloc();
    drawn_.assign(chunks, false);
  }

  // Where the noise of the chunk that begins at `begin` is kept (`draw` is given it once a sample), or null.
  template <class Draw>
  const T* kept_noise(int64_t begin, const Draw& draw) const {
    if (noise_ == nullptr) return nullptr;
    const auto chunk = static_cast<size_t>(begin / kChunk);
    if (!drawn_[chunk]) draw(noise_ + begin);
    drawn_[chunk] = true;
    return noise_ + begin;
  }

 private:
  void take() const {
    storage_ = std::malloc((static_cast<size_t>(buffers_) * kChunk + 64 / sizeof(T)) * sizeof(T));
    if (storage_ == nullptr) throw std::bad_alloc();
    const auto address = reinterpret_cast<uintptr_t>(storage_);
    first_ = static_cast<T*>(storage_) + ((64 - address % 64) % 64) / sizeof(T);
  }

  const int buffers_;
  mutable void* storage_ = nullptr;
  mutable T* first_ = nullptr;
  mutable T* noise_ = nullptr;
  mutable std::vector<bool> drawn_;  // of the chunks of the sample
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
