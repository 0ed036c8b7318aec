// What the checks and launchers need of a torch tensor, over the stable ABI: metadata, allocation, layouts.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/dtype.h"

namespace marquardt {

// A tensor of the stable ABI, held by its handle alone. torch::stable::Tensor adds a shared_ptr, an allocation for
// every argument of every call: a tenth of the whole call at one element.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle owned) : handle_(owned) {}
  Tensor(const Tensor& other) {
    if (other.handle_ != nullptr) aoti_torch_new_tensor_handle(other.handle_, &handle_);
  }
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle get() const { return handle_; }
  int64_t numel() const {
    int64_t n = 0;
    aoti_torch_get_numel(handle_, &n);
    return n;
  }
  bool is_contiguous() const {
    bool contiguous = false;
    aoti_torch_is_contiguous(handle_, &contiguous);
    return contiguous;
  }
  void* data() const {
    void* data = nullptr;
    aoti_torch_get_data_ptr(handle_, &data);
    return data;
  }
  // Overwrites this tensor with the elements of another of its shape.
  void copy_from(const Tensor& other) {
    if (aoti_torch_copy_(handle_, other.handle_, 0) != AOTI_TORCH_SUCCESS) {
      throw std::runtime_error("marquardt: a tensor could not be copied");
    }
  }

 private:
  AtenTensorHandle handle_ = nullptr;
};

// A tensor's metadata, read once: every accessor of the stable ABI is a call.
struct View {
  void* data;
  DType dtype;
  int32_t device_type;
  int32_t device_index;  // -1 on the CPU
  int64_t dims;
  const int64_t* sizes;
  const int64_t* strides;

  int64_t numel() const {
    int64_t n = 1;
    for (int64_t d = 0; d < dims; ++d) n *= sizes[d];
    return n;
  }
  bool on_cpu() const;
  bool on_cuda() const;
  bool same_device(const View& other) const {
    return device_type == other.device_type && device_index == other.device_index;
  }
  std::string device() const;  // "cpu", "cuda:1"
  bool same_shape(const View& other) const;
  std::string shape() const;
};

// Fails with a TypeError unless the tensor is of a floating dtype that the library computes with.
View floating_view(const char* op, const char* argument, const Tensor& t, int index = -1);

// For messages.
const char* dtype_name(const Tensor& t);

// "argument" or "argument[index]".
std::string label(const char* argument, int index);

// B and D: samples, and elements per sample. Fails unless batch_dims is 0 or 1 and fits.
struct Samples {
  int64_t batch, size;
};
Samples samples_of(const char* op, const char* argument, int index, const View& view, int64_t batch_dims);

// --- allocation ------------------------------------------------------------------------------------------------

// Test flag: fill new outputs with NaN, so that an element no kernel wrote is seen.
void set_poison(bool poison);

// A new tensor on the device of `like`.
Tensor empty_strided(const View& like, const int64_t* sizes, const int64_t* strides, int64_t dims, DType dtype);

// New [rows, columns] float64 beside `like`.
Tensor empty_scalars(const View& like, int64_t rows, int64_t columns);

// Columns [first, first + count) of a matrix, over the same memory.
Tensor columns_of(const Tensor& matrix, int64_t first, int64_t count);

// Every element becomes `value`, on any device, in the order of its current stream.
void fill(const Tensor& t, double value);

// --- layouts ---------------------------------------------------------------------------------------------------

constexpr int kMaxDims = 32;

// How a call walks its samples: the order of the dimensions behind the batch. Every tensor of the call is walked
// the same way; one that lies differently is copied.
struct Walk {
  int64_t batch_dims = 1;
  int64_t strides[kMaxDims];    // of every dimension; only those within a sample count
  bool first_is_dense = false;  // outputs take the strides of the first tensor
  bool row_major = false;

  // A walk in the order of `first` if its samples are dense, else in row-major order.
  static Walk of(const View& first, int64_t batch_dims, bool force_row_major);
  // Whether the samples of `view` lie as the walk goes; the batch stride is free.
  bool fits(const View& view) const;
};

// Batch stride (elements) of a view that fits.
int64_t batch_stride(const View& view, const Walk& walk, int64_t size);

// `t` if it fits the walk, else a copy that does.
Tensor fitting(const Tensor& t, View& view, const Walk& walk);

// A tensor a kernel writes: it fits the walk. `finish` copies it to where the caller wants it, if that is elsewhere.
class Result {
 public:
  // A new tensor with the shape of `first` and the strides promised for outputs.
  Result(const View& first, const Walk& walk, DType dtype);
  // The caller's `out`.
  Result(const Tensor& out, const View& out_view, const Walk& walk);

  const View& written() const { return written_view_; }
  Tensor finish();

 private:
  void stage_if_needed(const Walk& walk);

  Tensor target_;
  std::optional<Tensor> staged_;  // where the kernel writes if not into the target
  View target_view_, written_view_;
};

View view_of(const Tensor& t, DType dtype);

// Fails unless `out` is `input` itself (same memory, same strides) or apart from it.
void check_overlap(const char* op, const View& out, const View& input);
// Fails if two elements of `out` share memory.
void check_writable(const char* op, const View& out);

}  // namespace marquardt

// How TORCH_BOX carries it.
namespace torch::stable::detail {

template <>
struct FromImpl<marquardt::Tensor> {
  static StableIValue call(const marquardt::Tensor& t, uint64_t, bool) {
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(t.get(), &handle));
    return torch::stable::detail::from(handle);
  }
};

template <>
struct ToImpl<marquardt::Tensor> {
  static marquardt::Tensor call(StableIValue value, uint64_t, bool) {
    return marquardt::Tensor(torch::stable::detail::to<AtenTensorHandle>(value));
  }
};

}  // namespace torch::stable::detail
