// softmax_head_hvp on the CPU. Rows are cut into ranges, one a thread at a time, and a range into chunks, so that the
// logits z = x Gᵀ of all rows never exist. The products are torch's, on one thread each inside the loop: one barrier for
// the whole call, where products of many threads would have two a chunk. A handful of classes has a way of its own.
#include "lowrank/softmax_head.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <stdexcept>

#include "core/half.h"
#include "core/parallel.h"
#include "lowrank/buffer.h"
#include "lowrank/gram.h"

namespace marquardt {
namespace {

// All depend on shapes alone, so that what is summed where does not depend on the number of threads; torch's products
// give their own order to their sums. Chunks are not small: with each of them torch packs G anew.
constexpr int64_t kChunkElements = 1 << 21;  // of z: eight megabytes in float32
constexpr int64_t kFewClasses = 16;          // up to so many both products are our own
constexpr int64_t kRangeElements = 1 << 24;  // of the partial results of all ranges, beyond the first two
constexpr int64_t kMostRanges = 16;

void succeed(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("softmax_head_hvp: a matrix product failed");
}

// A matrix as torch sees it, over memory of ours.
Tensor matrix(void* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, DType dtype) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {row_stride, column_stride};
  AtenTensorHandle handle = nullptr;
  succeed(aoti_torch_create_tensor_from_blob(
      data, 2, sizes, strides, 0, dtype == DType::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <class T>
class Runner {
 public:
  explicit Runner(const SoftmaxHead& call)
      : call_(call),
        kernels_(typed_lowrank_kernels<T>()),
        n_(call.x.sizes[0]),
        d_(call.x.sizes[1]),
        c_(call.p.sizes[1]),
        chunk_(std::clamp(kChunkElements / std::max<int64_t>(c_, 1), int64_t{64}, int64_t{2048})),
        ranges_(std::clamp(kRangeElements / std::max<int64_t>(c_ * d_, 1), int64_t{2}, kMostRanges)) {
    ranges_ = std::clamp((n_ + chunk_ / 2 - 1) / (chunk_ / 2), int64_t{1}, ranges_);
  }

  void run() {
    if (c_ <= kFewClasses) return run_few();
    if (call_.g.dtype != kType) g_buffer_ = allocate<T>(c_ * d_);
    g_ = rows(call_.g, 0, c_, g_buffer_.get(), g_stride_);
    const bool direct = ranges_ == 1 && call_.out.dtype == kType;
    if (!direct) partial_ = allocate<T>(ranges_ * c_ * d_);
    T* to = direct ? static_cast<T*>(call_.out.data) : partial_.get();
    parallel_for(ranges_, true, [this, to](int64_t begin, int64_t end) {
      for (int64_t range = begin; range < end; ++range) run_range(range, to + range * c_ * d_);
    });
    if (!direct) merge(partial_.get(), d_, 1.0);
  }

 private:
  static constexpr DType kType = sizeof(T) == 8 ? DType::f64 : DType::f32;

  static int64_t row_stride(const View& view) { return view.sizes[0] == 1 ? view.sizes[1] : view.strides[0]; }

  // Rows [begin, begin + count) in the compute type: in place, or converted into `buffer`. The stride is `stride`.
  T* rows(const View& view, int64_t begin, int64_t count, T* buffer, int64_t& stride) const {
    return padded_rows(view, begin, count, view.sizes[1], buffer, stride);
  }

  // The same with zeros behind each row, up to `padded` numbers.
  T* padded_rows(const View& view, int64_t begin, int64_t count, int64_t padded, T* buffer, int64_t& stride) const {
    char* data = static_cast<char*>(view.data) + begin * row_stride(view) * size_of(view.dtype);
    stride = row_stride(view);
    if (view.dtype == kType && padded == view.sizes[1]) return reinterpret_cast<T*>(data);
    kernels_.pack(view.dtype, data, stride, count, view.sizes[1], padded, buffer, padded);
    stride = padded;
    return buffer;
  }

  // A handful of classes: blocks of rows, each read once, summed in double.
  void run_few() {
    constexpr int64_t kPad = kPadBytes / static_cast<int64_t>(sizeof(T));
    const int64_t features = (d_ + kPad - 1) / kPad * kPad, size = c_ * features;
    g_buffer_ = allocate<T>(size);
    kernels_.pack(call_.g.dtype, call_.g.data, row_stride(call_.g), c_, d_, features, g_buffer_.get(), features);
    const Buffer<double> sums = allocate<double>(ranges_ * size);
    std::fill_n(sums.get(), ranges_ * size, 0.0);
    parallel_for(ranges_, true, [&](int64_t begin, int64_t end) {
      const Buffer<T> x_buffer = allocate<T>(kHeadRows * features), p_buffer = allocate<T>(kHeadRows * c_),
                      z = allocate<T>(kHeadGroup * c_), block = allocate<T>(size);
      for (int64_t range = begin; range < end; ++range) {
        const int64_t last = n_ * (range + 1) / ranges_;
        for (int64_t r = n_ * range / ranges_; r < last; r += kHeadRows) {
          const int64_t count = std::min(kHeadRows, last - r);
          int64_t x_stride = 0, p_stride = 0;
          const T* x = padded_rows(call_.x, r, count, features, x_buffer.get(), x_stride);
          const T* p = rows(call_.p, r, count, p_buffer.get(), p_stride);
          kernels_.few_classes(x, x_stride, p, p_stride, g_buffer_.get(), count, c_, features, z.get(), block.get(),
                               sums.get() + range * size);
        }
      }
    });
    merge(sums.get(), features, 1.0 / static_cast<double>(n_));
  }

  void run_range(int64_t range, T* to) const {
    const int64_t begin = n_ * range / ranges_, end = n_ * (range + 1) / ranges_;
    const bool converts = call_.x.dtype != kType;
    const Buffer<T> z = allocate<T>(chunk_ * c_), x_buffer = allocate<T>(converts ? chunk_ * d_ : 0),
                    p_buffer = allocate<T>(converts ? chunk_ * c_ : 0);
    const Tensor g = matrix(g_, d_, c_, 1, g_stride_, kType);
    const Tensor out = matrix(to, c_, d_, d_, 1, kType);
    for (int64_t r = begin; r < end; r += chunk_) {
      const int64_t count = std::min(chunk_, end - r);
      int64_t x_stride = 0, p_stride = 0;
      T* x = rows(call_.x, r, count, x_buffer.get(), x_stride);
      T* p = rows(call_.p, r, count, p_buffer.get(), p_stride);
      const Tensor x_rows = matrix(x, count, d_, x_stride, 1, kType);
      const Tensor z_rows = matrix(z.get(), count, c_, c_, 1, kType);
      const Tensor z_columns = matrix(z.get(), c_, count, 1, c_, kType);
      succeed(aoti_torch_cpu_mm_out(z_rows.get(), x_rows.get(), g.get()));
      kernels_.softmax_jvp(p, p_stride, z.get(), c_, count, c_);
      succeed(aoti_torch_cpu_addmm_out(out.get(), out.get(), z_columns.get(), x_rows.get(), r == begin ? 0.0 : 1.0,
                                       1.0 / static_cast<double>(n_)));
    }
  }

  // The sum of the ranges [ranges, C, stride] in their order, into the dtype of the result.
  template <class S>
  void merge(const S* sums, int64_t stride, double factor) const {
    const int64_t size = c_ * d_;
    constexpr int64_t kPiece = 1 << 14;
    parallel_for((size + kPiece - 1) / kPiece, true, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin * kPiece; at < std::min(end * kPiece, size); ++at) {
        double sum = 0.0;
        for (int64_t range = 0; range < ranges_; ++range)
          sum += static_cast<double>(sums[(range * c_ + at / d_) * stride + at % d_]);
        write(at, sum * factor);
      }
    });
  }

  void write(int64_t at, double value) const {
    switch (call_.out.dtype) {
      case DType::f64: static_cast<double*>(call_.out.data)[at] = value; return;
      case DType::f32: static_cast<float*>(call_.out.data)[at] = static_cast<float>(value); return;
      case DType::bf16: static_cast<uint16_t*>(call_.out.data)[at] = bf16_of(static_cast<float>(value)); return;
      case DType::f16: static_cast<uint16_t*>(call_.out.data)[at] = f16_of(static_cast<float>(value)); return;
    }
  }

  const SoftmaxHead& call_;
  const TypedLowrankKernels<T>& kernels_;
  int64_t n_, d_, c_, chunk_, ranges_;
  T* g_ = nullptr;  // [C, d]
  int64_t g_stride_ = 0;
  Buffer<T> g_buffer_, partial_;  // partial_: [ranges, C, d]
};

}  // namespace

void softmax_head_hvp(const SoftmaxHead& call) {
  if (call.x.dtype == DType::f64) {
    Runner<double>(call).run();
  } else {
    Runner<float>(call).run();
  }
}

}  // namespace marquardt
