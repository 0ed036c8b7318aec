#include "core/tensor.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <numeric>

#include "core/pages.h"

namespace marquardt {
namespace {

std::atomic<bool> poison{false};

int32_t shim_dtype(DType dtype) {
  switch (dtype) {
    case DType::f32: return aoti_torch_dtype_float32();
    case DType::f64: return aoti_torch_dtype_float64();
    case DType::bf16: return aoti_torch_dtype_bfloat16();
    case DType::f16: return aoti_torch_dtype_float16();
  }
  return -1;
}

const char* name_of_shim_dtype(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return "float32";
  if (dtype == aoti_torch_dtype_float64()) return "float64";
  if (dtype == aoti_torch_dtype_int64()) return "int64";
  if (dtype == aoti_torch_dtype_int32()) return "int32";
  if (dtype == aoti_torch_dtype_int16()) return "int16";
  if (dtype == aoti_torch_dtype_int8()) return "int8";
  if (dtype == aoti_torch_dtype_uint8()) return "uint8";
  if (dtype == aoti_torch_dtype_bool()) return "bool";
  if (dtype == aoti_torch_dtype_complex64()) return "complex64";
  if (dtype == aoti_torch_dtype_complex128()) return "complex128";
  return "another dtype";
}

int32_t cpu_type() {
  static const int32_t type = aoti_torch_device_type_cpu();
  return type;
}

int32_t cuda_type() {
  static const int32_t type = aoti_torch_device_type_cuda();
  return type;
}

void fill_nan(const Tensor& t, const View& like, DType dtype) {
  if (!like.on_cpu()) return fill(t, std::numeric_limits<double>::quiet_NaN());
  const int64_t n = t.numel();
  void* data = t.data();
  switch (dtype) {
    case DType::f32: std::fill_n(static_cast<float*>(data), n, std::numeric_limits<float>::quiet_NaN()); return;
    case DType::f64: std::fill_n(static_cast<double*>(data), n, std::numeric_limits<double>::quiet_NaN()); return;
    default: std::fill_n(static_cast<uint16_t*>(data), n, static_cast<uint16_t>(0x7fff)); return;  // NaN in both
  }
}

// From the first byte to the last.
int64_t bytes_of(const int64_t* sizes, const int64_t* strides, int64_t dims, DType dtype) {
  int64_t last = 0;
  for (int64_t d = 0; d < dims; ++d) {
    if (sizes[d] == 0) return 0;
    last += (sizes[d] - 1) * strides[d];
  }
  return (last + 1) * size_of(dtype);
}

void row_major_strides(const View& view, int64_t* strides) {
  int64_t step = 1;
  for (int64_t d = view.dims - 1; d >= 0; --d) {
    strides[d] = step;
    step *= std::max<int64_t>(view.sizes[d], 1);
  }
}

bool is_row_major(const View& view, int64_t from) {
  int64_t expected = 1;
  for (int64_t d = view.dims - 1; d >= from; --d) {
    if (view.sizes[d] == 1) continue;
    if (view.strides[d] != expected) return false;
    expected *= view.sizes[d];
  }
  return true;
}

// Whether dimensions [from, dims) cover one block once, in any order.
bool is_dense(const View& view, int64_t from) {
  if (is_row_major(view, from)) return true;
  int64_t order[kMaxDims];
  int64_t count = 0;
  for (int64_t d = from; d < view.dims; ++d)
    if (view.sizes[d] != 1) order[count++] = d;
  std::sort(order, order + count, [&](int64_t a, int64_t b) { return view.strides[a] < view.strides[b]; });
  int64_t expected = 1;
  for (int64_t i = 0; i < count; ++i) {
    if (view.strides[order[i]] != expected) return false;
    expected *= view.sizes[order[i]];
  }
  return true;
}

// First byte and one past the last.
std::pair<uintptr_t, uintptr_t> span_of(const View& view) {
  int64_t last = 0;
  for (int64_t d = 0; d < view.dims; ++d) last += (view.sizes[d] - 1) * view.strides[d];
  const auto begin = reinterpret_cast<uintptr_t>(view.data);
  return {begin, begin + static_cast<uintptr_t>((last + 1) * size_of(view.dtype))};
}

// Two views of the same strides that lie beside one another in a larger tensor, as channel slices do: between two
// steps of the outermost dimension neither reaches the other.
bool interleaved(const View& a, const View& b) {
  if (a.dtype != b.dtype) return false;
  int64_t outer = -1, inner = 1;
  for (int64_t d = 0; d < a.dims; ++d) {
    if (a.sizes[d] == 1) continue;
    if (a.strides[d] != b.strides[d]) return false;
    if (outer < 0 || a.strides[d] > a.strides[outer]) outer = d;
  }
  if (outer < 0) return false;
  for (int64_t d = 0; d < a.dims; ++d)
    if (d != outer) inner += (a.sizes[d] - 1) * a.strides[d];
  const int64_t size = size_of(a.dtype), step = a.strides[outer] * size, length = inner * size;
  if (step == 0) return false;
  const int64_t distance = std::abs(reinterpret_cast<intptr_t>(a.data) - reinterpret_cast<intptr_t>(b.data)) % step;
  return distance >= length && step - distance >= length;
}

}  // namespace

const char* dtype_name(const Tensor& t) {
  int32_t dtype = 0;
  aoti_torch_get_dtype(t.get(), &dtype);
  return name_of_shim_dtype(dtype);
}

std::string label(const char* argument, int index) {
  return index < 0 ? std::string(argument) : join(argument, "[", index, "]");
}

bool View::on_cpu() const {
  return device_type == cpu_type();
}

bool View::on_cuda() const {
  return device_type == cuda_type();
}

std::string View::device() const {
  if (on_cpu()) return "cpu";
  if (on_cuda()) return join("cuda:", device_index);
  if (device_type == aoti_torch_device_type_meta()) return "meta";
  if (device_type == aoti_torch_device_type_mps()) return join("mps:", device_index);
  if (device_type == aoti_torch_device_type_xpu()) return join("xpu:", device_index);
  return "another device";
}

bool View::same_shape(const View& other) const {
  if (dims != other.dims) return false;
  for (int64_t d = 0; d < dims; ++d)
    if (sizes[d] != other.sizes[d]) return false;
  return true;
}

std::string View::shape() const {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < dims; ++d) text << (d > 0 ? ", " : "") << sizes[d];
  text << "]";
  return text.str();
}

View floating_view(const char* op, const char* argument, const Tensor& t, int index) {
  // A sparse tensor among dense ones may get here.
  DType found = DType::f32;
  int32_t dtype = 0, layout = 0;
  aoti_torch_get_layout(t.get(), &layout);
  if (layout != aoti_torch_layout_strided()) {
    type_error(op, label(argument, index), "be a dense tensor", "a sparse one");
  }
  aoti_torch_get_dtype(t.get(), &dtype);
  if (dtype == aoti_torch_dtype_float32()) {
    found = DType::f32;
  } else if (dtype == aoti_torch_dtype_bfloat16()) {
    found = DType::bf16;
  } else if (dtype == aoti_torch_dtype_float16()) {
    found = DType::f16;
  } else if (dtype == aoti_torch_dtype_float64()) {
    found = DType::f64;
  } else {
    type_error(op, label(argument, index), "be float32, float64, bfloat16 or float16", name_of_shim_dtype(dtype));
  }
  return view_of(t, found);
}

View view_of(const Tensor& t, DType dtype) {
  View view;
  view.dtype = dtype;
  int64_t *sizes = nullptr, *strides = nullptr;
  aoti_torch_get_data_ptr(t.get(), &view.data);
  aoti_torch_get_device_type(t.get(), &view.device_type);
  view.device_index = -1;
  if (!view.on_cpu()) aoti_torch_get_device_index(t.get(), &view.device_index);
  aoti_torch_get_dim(t.get(), &view.dims);
  aoti_torch_get_sizes(t.get(), &sizes);
  aoti_torch_get_strides(t.get(), &strides);
  view.sizes = sizes;
  view.strides = strides;
  if (view.dims > kMaxDims)
    throw std::runtime_error(join("ValueError: marquardt: tensors have at most ", kMaxDims, " dimensions"));
  return view;
}

Samples samples_of(const char* op, const char* argument, int index, const View& view, int64_t batch_dims) {
  if (batch_dims != 0 && batch_dims != 1) value_error(op, "batch_dims", "be 0 or 1", batch_dims);
  if (view.dims < batch_dims) value_error(op, label(argument, index), "have a batch dimension", view.shape());
  Samples s{1, 1};
  for (int64_t d = 0; d < view.dims; ++d) (d < batch_dims ? s.batch : s.size) *= view.sizes[d];
  return s;
}

void set_poison(bool on) {
  poison = on;
}

Tensor empty_strided(const View& like, const int64_t* sizes, const int64_t* strides, int64_t dims, DType dtype) {
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(dims, sizes, strides, shim_dtype(dtype), like.device_type, like.device_index, &handle) !=
      AOTI_TORCH_SUCCESS) {
    const int64_t mib = (bytes_of(sizes, strides, dims, dtype) + (1 << 20) - 1) >> 20;
    throw std::runtime_error(
        join("OutOfMemoryError: marquardt: ", mib, " MiB could not be allocated on ", like.device()));
  }
  Tensor t(handle);
  if (like.on_cpu()) advise_huge_pages(t.data(), bytes_of(sizes, strides, dims, dtype));
  if (poison) fill_nan(t, like, dtype);
  return t;
}

Tensor empty_scalars(const View& like, int64_t rows, int64_t columns) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {std::max<int64_t>(columns, 1), 1};
  return empty_strided(like, sizes, strides, 2, DType::f64);
}

Tensor columns_of(const Tensor& matrix, int64_t first, int64_t count) {
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_aten_narrow(matrix.get(), 1, first, count, &handle) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("marquardt: columns of a matrix could not be taken");
  }
  return Tensor(handle);
}

void fill(const Tensor& t, double value) {
  if (aoti_torch_aten_fill__Scalar(t.get(), value) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("marquardt: a tensor could not be filled");
  }
}

Walk Walk::of(const View& first, int64_t batch_dims, bool force_row_major) {
  Walk walk;
  walk.batch_dims = batch_dims;
  walk.first_is_dense = first.numel() > 0 && is_dense(first, 0);
  if (!force_row_major && is_dense(first, batch_dims)) {
    std::copy_n(first.strides, first.dims, walk.strides);
    walk.row_major = is_row_major(first, batch_dims);
  } else {
    row_major_strides(first, walk.strides);
    walk.row_major = true;
  }
  return walk;
}

bool Walk::fits(const View& view) const {
  for (int64_t d = batch_dims; d < view.dims; ++d)
    if (view.sizes[d] != 1 && view.strides[d] != strides[d]) return false;
  return true;
}

int64_t batch_stride(const View& view, const Walk& walk, int64_t size) {
  return walk.batch_dims == 1 && view.sizes[0] != 1 ? view.strides[0] : size;
}

namespace {

// A new tensor shaped like `view` in the order of the walk, samples behind one another.
Tensor empty_in_order(const View& view, const Walk& walk) {
  int64_t strides[kMaxDims];
  std::copy_n(walk.strides, view.dims, strides);
  if (walk.batch_dims == 1) {
    strides[0] = 1;
    for (int64_t d = 1; d < view.dims; ++d) strides[0] *= view.sizes[d];
  }
  return empty_strided(view, view.sizes, strides, view.dims, view.dtype);
}

Tensor empty_like_first(const View& first, const Walk& walk, DType dtype) {
  if (walk.first_is_dense) return empty_strided(first, first.sizes, first.strides, first.dims, dtype);
  int64_t strides[kMaxDims];
  row_major_strides(first, strides);
  return empty_strided(first, first.sizes, strides, first.dims, dtype);
}

}  // namespace

Tensor fitting(const Tensor& t, View& view, const Walk& walk) {
  if (view.numel() == 0 || walk.fits(view)) return t;
  Tensor copy = empty_in_order(view, walk);
  copy.copy_from(t);
  view = view_of(copy, view.dtype);
  return copy;
}

Result::Result(const View& first, const Walk& walk, DType dtype)
    : target_(empty_like_first(first, walk, dtype)),
      target_view_(view_of(target_, dtype)),
      written_view_(target_view_) {
  stage_if_needed(walk);
}

Result::Result(const Tensor& out, const View& out_view, const Walk& walk)
    : target_(out), target_view_(out_view), written_view_(out_view) {
  stage_if_needed(walk);
}

void Result::stage_if_needed(const Walk& walk) {
  if (walk.fits(target_view_) || target_view_.numel() == 0) return;
  staged_ = empty_in_order(target_view_, walk);
  written_view_ = view_of(*staged_, target_view_.dtype);
}

Tensor Result::finish() {
  if (staged_.has_value()) target_.copy_from(*staged_);
  return std::move(target_);
}

void check_overlap(const char* op, const View& out, const View& input) {
  if (out.numel() == 0 || input.numel() == 0) return;
  bool same = out.data == input.data && out.dtype == input.dtype;
  for (int64_t d = 0; same && d < out.dims; ++d) same = out.sizes[d] == 1 || out.strides[d] == input.strides[d];
  if (same) return;
  const auto [a, b] = span_of(out);
  const auto [c, d] = span_of(input);
  if (a < d && c < b && !interleaved(out, input)) {
    value_error(op, "out", "be an input itself or share no memory with one", "a partial overlap");
  }
}

void check_writable(const char* op, const View& out) {
  // In the order of strides each dimension must step over all that the smaller ones reach.
  int64_t order[kMaxDims], count = 0, reach = 0;
  for (int64_t d = 0; d < out.dims; ++d)
    if (out.sizes[d] > 1) order[count++] = d;
  std::sort(order, order + count, [&](int64_t a, int64_t b) { return out.strides[a] < out.strides[b]; });
  for (int64_t i = 0; i < count; ++i) {
    const int64_t stride = out.strides[order[i]];
    if (stride <= reach) value_error(op, "out", "have no repeated elements", join("stride ", stride));
    reach += (out.sizes[order[i]] - 1) * stride;
  }
}

}  // namespace marquardt
