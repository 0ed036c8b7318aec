#include "frame/launch.h"

#include <utility>

namespace marquardt {
namespace {

bool pairs_with(DType state, DType model) {
  return state == model || (state == DType::f32 && model != DType::f64);
}

}  // namespace

FrameLauncher::FrameLauncher(const char* op, const char* argument, const Tensor& first, int index, int64_t batch_dims,
                             bool noisy)
    : op_(op),
      first_name_(argument),
      first_index_(index),
      first_(first),
      state_(floating_view(op, argument, first, index)) {
  const Samples samples = samples_of(op, label(argument, index).c_str(), state_, batch_dims);
  if (state_.device_type != aoti_torch_device_type_cpu()) {
    value_error(op, label(argument, index), "be on the CPU here", "another device");
  }
  call.batch = samples.batch;
  call.size = samples.size;
  call.compute = state_.dtype == DType::f64 ? DType::f64 : DType::f32;
  walk_ = Walk::of(state_, batch_dims, noisy);
  results_.reserve(kMaxOutputs);
}

void FrameLauncher::append(const Tensor& t, View view) {
  if (call.streams == kMaxVectors) value_error(op_, "streams", join("hold at most ", kMaxVectors, " vectors"), "more");
  inputs_.push_back(view);
  keep_.push_back(fitting(t, view, walk_));
  call.stream[call.streams++] = {view.data, view.dtype, batch_stride(view, walk_, call.size)};
  call.rows = call.streams;
}

void FrameLauncher::add_state() {
  append(first_, state_);
}

void FrameLauncher::add(const char* argument, const Tensor& t, int index) {
  const View view = floating_view(op_, argument, t, index);
  const auto first = [this] { return label(first_name_, first_index_); };
  if (!view.same_shape(state_)) {
    value_error(op_, label(argument, index), join("have the shape of ", first(), " (", state_.shape(), ")"),
                view.shape());
  }
  if (view.device_type != state_.device_type || view.device_index != state_.device_index) {
    value_error(op_, label(argument, index), join("be on the device of ", first(), " (cpu)"), "another device");
  }
  if (!pairs_with(state_.dtype, view.dtype)) {
    type_error(op_, label(argument, index),
               join("have a dtype that pairs with ", first(), " (", name_of(state_.dtype), ")"), name_of(view.dtype));
  }
  if (view.dtype != state_.dtype) {
    if (model_.has_value() && *model_ != view.dtype) {
      type_error(op_, label(argument, index),
                 join("have the state's dtype (", name_of(state_.dtype), ") or the model's (", name_of(*model_), ")"),
                 name_of(view.dtype));
    }
    model_ = view.dtype;
  }
  append(t, view);
}

void FrameLauncher::parameters(const std::optional<Tensor>& coef, const std::vector<double>& values, int64_t columns,
                               const char* argument) {
  if (!coef.has_value()) {
    if (static_cast<int64_t>(values.size()) != columns) {
      value_error(op_, argument, join("have ", columns, " columns"), values.size());
    }
    values_ = values;
    call.parameters = values_.data();
    return;
  }
  const View view = floating_view(op_, argument, *coef);
  if (view.dtype != DType::f64) type_error(op_, argument, "be float64", name_of(view.dtype));
  const bool shared = view.dims == 1 && view.sizes[0] == columns;
  const bool each = view.dims == 2 && view.sizes[0] == call.batch && view.sizes[1] == columns;
  if (!shared && !each) {
    value_error(op_, argument, join("have shape [", columns, "] or [", call.batch, ", ", columns, "]"), view.shape());
  }
  if (view.device_type != state_.device_type) value_error(op_, argument, "be on the CPU", "another device");
  // Copied: a few numbers, whatever their strides, that nobody changes while the kernel runs.
  const int64_t rows = shared ? 1 : call.batch, row_stride = shared ? 0 : view.strides[0];
  const int64_t column_stride = view.strides[view.dims - 1];
  const double* data = static_cast<const double*>(view.data);
  values_.resize(static_cast<size_t>(rows * columns));
  for (int64_t b = 0; b < rows; ++b)
    for (int64_t j = 0; j < columns; ++j)
      values_[static_cast<size_t>(b * columns + j)] = data[b * row_stride + j * column_stride];
  call.parameters = values_.data();
  call.parameter_stride = shared ? 0 : columns;
}

void FrameLauncher::noise(const std::optional<Tensor>& seed) {
  if (!seed.has_value()) return;
  int32_t dtype = 0;
  aoti_torch_get_dtype(seed->get(), &dtype);
  if (dtype != aoti_torch_dtype_int64()) type_error(op_, "seed", "be an int64 tensor", "another dtype");
  const View view = view_of(*seed, DType::f64);
  const bool shared = view.dims == 1 && view.sizes[0] == 2;
  const bool each = view.dims == 2 && view.sizes[0] == call.batch && view.sizes[1] == 2;
  if (!shared && !each) value_error(op_, "seed", join("have shape [2] or [", call.batch, ", 2]"), view.shape());
  if (view.device_type != state_.device_type) {
    value_error(op_, "seed", "be on the data's device (cpu)", "another device");
  }
  Tensor dense = *seed;
  if (view.strides[view.dims - 1] != 1 || (each && view.strides[0] != 2)) {
    value_error(op_, "seed", "be contiguous", "strides with gaps");
  }
  keep_.push_back(dense);
  call.seed = static_cast<const int64_t*>(view.data);
  call.seed_stride = shared ? 0 : 2;
  call.rows = call.streams + 1;
}

Result& FrameLauncher::output(DType dtype) {
  results_.emplace_back(state_, walk_, dtype);
  const View& view = results_.back().written();
  call.output[call.outputs++] = {view.data, dtype, batch_stride(view, walk_, call.size)};
  return results_.back();
}

Result& FrameLauncher::output(const Tensor& out) {
  const View view = floating_view(op_, "out", out);
  const std::string first = label(first_name_, first_index_);
  if (!view.same_shape(state_)) {
    value_error(op_, "out", join("have the shape of ", first, " (", state_.shape(), ")"), view.shape());
  }
  if (view.dtype != state_.dtype) {
    type_error(op_, "out", join("have the dtype of ", first, " (", name_of(state_.dtype), ")"), name_of(view.dtype));
  }
  if (view.device_type != state_.device_type) {
    value_error(op_, "out", join("be on the device of ", first, " (cpu)"), "another device");
  }
  check_writable(op_, view);
  for (const View& input : inputs_) check_overlap(op_, view, input);
  results_.emplace_back(out, view, walk_);
  const View& written = results_.back().written();
  call.output[call.outputs++] = {written.data, written.dtype, batch_stride(written, walk_, call.size)};
  return results_.back();
}

Tensor FrameLauncher::scalars(int64_t columns) {
  Tensor t = empty_scalars(state_, call.batch, columns);
  call.scalars = static_cast<double*>(t.mutable_data_ptr());
  call.scalar_stride = columns;
  return t;
}

const double* FrameLauncher::parameter_row(int64_t b) const {
  return call.parameters + b * call.parameter_stride;
}

int64_t FrameLauncher::parameter_rows() const {
  return call.parameter_stride == 0 ? 1 : call.batch;
}

std::vector<Tensor> FrameLauncher::run() {
  frame_cpu(call);
  std::vector<Tensor> outputs;
  outputs.reserve(results_.size());
  for (Result& r : results_) outputs.push_back(r.finish());
  return outputs;
}

}  // namespace marquardt
