#include "frame/launch.h"

#include <algorithm>
#include <utility>

#include "frame/run.h"

namespace marquardt {
namespace {

bool pairs_with(DType state, DType model) {
  return state == model || (state == DType::f32 && model != DType::f64);
}

// Columns [at, at + m) of a table on a GPU: rows of a tensor there, or m numbers of the host for every row. Launches
// alone, so that it can be captured and waits for nothing.
void write_columns(const Tensor& table, int64_t at, int64_t m, const Tensor* rows, const double* numbers) {
  if (rows != nullptr) {
    columns_of(table, at, m).copy_from(*rows);
  } else {
    for (int64_t j = 0; j < m; ++j) fill(columns_of(table, at + j, 1), numbers[j]);
  }
}

}  // namespace

FrameLauncher::FrameLauncher(const char* op, const char* argument, const Tensor& first, int index, int64_t batch_dims,
                             bool noisy)
    : op_(op),
      first_name_(argument),
      first_index_(index),
      first_(first),
      state_(floating_view(op, argument, first, index)),
      gpu_(on_gpu(state_)) {
  const Samples samples = samples_of(op, argument, index, state_, batch_dims);
  if (!gpu_ && !state_.on_cpu()) value_error(op, label(argument, index), "be on the CPU here", state_.device());
  call.batch = samples.batch;
  call.size = samples.size;
  call.compute = state_.dtype == DType::f64 ? DType::f64 : DType::f32;
  walk_ = Walk::of(state_, batch_dims, noisy);
}

namespace {

// One row of a stack: its view without dimension `at`, whose size and strides go into the two arrays.
View row_view(View stack, int64_t at, int64_t* sizes, int64_t* strides) {
  int64_t dims = 0;
  for (int64_t d = 0; d < stack.dims; ++d) {
    if (d == at) continue;
    sizes[dims] = stack.sizes[d];
    strides[dims++] = stack.strides[d];
  }
  stack.dims = dims;
  stack.sizes = sizes;
  stack.strides = strides;
  return stack;
}

View stack_view(const char* op, const char* argument, const Tensor& stack, int64_t batch_dims) {
  const View view = floating_view(op, argument, stack);
  if (batch_dims != 0 && batch_dims != 1) value_error(op, "batch_dims", "be 0 or 1", batch_dims);
  if (view.dims < batch_dims + 1) {
    value_error(op, argument, batch_dims == 1 ? "have shape [B, k, *sample]" : "have shape [k, *sample]", view.shape());
  }
  return view;
}

}  // namespace

FrameLauncher::FrameLauncher(const char* op, const char* argument, const Tensor& stack, int64_t batch_dims)
    : op_(op),
      first_name_(argument),
      first_index_(-1),
      first_(stack),
      state_(row_view(stack_view(op, argument, stack, batch_dims), batch_dims, row_sizes_, row_strides_)),
      gpu_(on_gpu(state_)) {
  const Samples samples = samples_of(op, argument, -1, state_, batch_dims);
  if (!gpu_ && !state_.on_cpu()) value_error(op, argument, "be on the CPU here", state_.device());
  call.batch = samples.batch;
  call.size = samples.size;
  call.compute = state_.dtype == DType::f64 ? DType::f64 : DType::f32;
  walk_ = Walk::of(state_, batch_dims, false);
}

void FrameLauncher::append(const Tensor& t, View view) {
  if (call.streams == kMaxVectors) value_error(op_, "streams", join("hold at most ", kMaxVectors, " vectors"), "more");
  inputs_[call.streams] = view;
  if (!walk_.fits(view) && view.numel() > 0) copies_.push_back(fitting(t, view, walk_));
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
  check_beside(argument, index, view);
  append(t, view);
}

void FrameLauncher::check_beside(const char* argument, int index, const View& view) {
  const auto first = [this] { return label(first_name_, first_index_); };
  if (!view.same_device(state_)) {
    value_error(op_, label(argument, index), join("be on the device of ", first(), " (", state_.device(), ")"),
                view.device());
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
}

int FrameLauncher::add_stack(const char* argument, const Tensor& stack) {
  const View view = floating_view(op_, argument, stack);
  const bool own = view.dims == state_.dims + 1, shared = view.dims == state_.dims + 1 - walk_.batch_dims;
  const int64_t at = own ? walk_.batch_dims : 0;  // of the dimension k
  bool fits = own || shared;
  for (int64_t d = own ? 0 : walk_.batch_dims; fits && d < state_.dims; ++d)
    fits = view.sizes[own && d < at ? d : d + 1 - (own ? 0 : walk_.batch_dims)] == state_.sizes[d];
  const std::string first = label(first_name_, first_index_);
  if (!fits) {
    value_error(op_, argument, join("have shape [B, k, *sample] or [k, *sample], with ", first, " ", state_.shape()),
                view.shape());
  }
  const int64_t k = view.sizes[at];
  if (k > kMaxVectors - 2) value_error(op_, argument, join("have at most ", kMaxVectors - 2, " rows"), k);
  check_beside(argument, -1, view);

  // The order of a sample's elements is that of the walk, or the stack is copied.
  View used = view;
  bool in_order = true;
  for (int64_t d = walk_.batch_dims; d < state_.dims; ++d) {
    const int64_t stride = view.strides[own ? d + 1 : d + 1 - walk_.batch_dims];
    in_order = in_order && (state_.sizes[d] == 1 || stride == walk_.strides[d]);
  }
  if (!in_order && view.numel() > 0) {
    int64_t strides[kMaxDims + 1];
    if (own && walk_.batch_dims == 1) strides[0] = k * call.size;
    strides[at] = call.size;
    for (int64_t d = walk_.batch_dims; d < state_.dims; ++d)
      strides[own ? d + 1 : d + 1 - walk_.batch_dims] = walk_.strides[d];
    Tensor copy = empty_strided(view, view.sizes, strides, view.dims, view.dtype);
    copy.copy_from(stack);
    used = view_of(copy, view.dtype);
    copies_.push_back(std::move(copy));
  }
  const int64_t batch_stride = own && walk_.batch_dims == 1 && state_.sizes[0] != 1 ? used.strides[0] : 0;
  for (int64_t j = 0; j < k; ++j) {
    const auto* row = static_cast<const char*>(used.data) + j * used.strides[at] * size_of(used.dtype);
    inputs_[call.streams] = used;
    call.stream[call.streams++] = {row, used.dtype, batch_stride};
  }
  call.rows = call.streams;
  return static_cast<int>(k);
}

Tensor FrameLauncher::output_stack(int count, DType dtype) {
  int64_t sizes[kMaxDims + 1], strides[kMaxDims + 1];
  const int64_t head = walk_.batch_dims;
  if (head == 1) sizes[0] = state_.sizes[0], strides[0] = std::max<int64_t>(1, count * call.size);
  sizes[head] = count;
  strides[head] = std::max<int64_t>(1, call.size);
  for (int64_t d = head; d < state_.dims; ++d) {
    sizes[d + 1] = state_.sizes[d];
    strides[d + 1] = walk_.strides[d];
  }
  Tensor stack = empty_strided(state_, sizes, strides, state_.dims + 1, dtype);
  auto* data = static_cast<char*>(stack.data());
  for (int64_t i = 0; i < count; ++i)
    call.output[call.outputs++] = {data + i * call.size * size_of(dtype), dtype, count * call.size};
  return stack;
}

FrameLauncher::Rows FrameLauncher::rows_of(const char* argument, const Tensor& t, int64_t columns) const {
  const View view = floating_view(op_, argument, t);
  if (view.dtype != DType::f64) type_error(op_, argument, "be float64", name_of(view.dtype));
  Rows found;
  found.shared = view.dims == 1 && view.sizes[0] == columns;
  const bool each = view.dims == 2 && view.sizes[0] == call.batch && view.sizes[1] == columns;
  if (!found.shared && !each) {
    value_error(op_, argument, join("have shape [", columns, "] or [", call.batch, ", ", columns, "]"), view.shape());
  }
  found.on_cpu = view.on_cpu();
  if (found.shared && !found.on_cpu) {
    value_error(op_, argument, "be on the CPU when it is shared by the batch", view.device());
  }
  if (each && !view.same_device(state_)) {
    value_error(op_, argument, join("be on the data's device (", state_.device(), ")"), view.device());
  }
  found.data = static_cast<const double*>(view.data);
  const int64_t rows = found.shared ? 1 : call.batch, row_stride = found.shared ? columns : view.strides[0];
  const int64_t column_stride = view.strides[view.dims - 1];
  found.dense = column_stride == 1 && row_stride == columns;
  if (found.dense || (gpu_ && each)) return found;
  found.copy.resize(static_cast<size_t>(rows * columns));
  for (int64_t b = 0; b < rows; ++b)
    for (int64_t j = 0; j < columns; ++j)
      found.copy[static_cast<size_t>(b * columns + j)] = found.data[b * row_stride + j * column_stride];
  found.data = found.copy.data();
  found.dense = true;
  return found;
}

void FrameLauncher::use_values(std::vector<double> values, int64_t columns, bool shared) {
  values_ = std::move(values);
  call.parameters = values_.data();
  call.parameter_stride = shared ? 0 : columns;
  call.parameter_count = static_cast<int>(columns);
}

void FrameLauncher::use_table(Tensor table, int64_t columns) {
  table_ = std::move(table);
  coef_ = &table_;
  call.parameters = static_cast<const double*>(table_.data());
  call.parameter_stride = columns;
  call.parameter_count = static_cast<int>(columns);
  call.host_parameters = false;
}

void FrameLauncher::parameters(const Tensor& coef, int64_t columns) {
  Rows rows = rows_of("coef", coef, columns);
  columns_ = columns;
  readable_ = rows.on_cpu;
  call.host_parameters = rows.shared;
  if (!rows.copy.empty()) return use_values(std::move(rows.copy), columns, rows.shared);
  if (gpu_ && !rows.shared) coef_ = &coef;
  if (!rows.dense) {
    Tensor table = empty_scalars(state_, call.batch, columns);
    table.copy_from(coef);
    return use_table(std::move(table), columns);
  }
  call.parameters = rows.data;
  call.parameter_stride = rows.shared ? 0 : columns;
  call.parameter_count = static_cast<int>(columns);
}

void FrameLauncher::tangents(const Tensor& coef_t) {
  const Rows moved = rows_of("coef_t", coef_t, columns_);
  const bool shared = moved.shared && call.parameter_stride == 0;
  const int64_t rows = shared ? 1 : call.batch, m = columns_;
  if (gpu_ && !shared) {
    Tensor table = empty_scalars(state_, rows, 2 * m);
    write_columns(table, 0, m, coef_, call.parameters);
    write_columns(table, m, m, moved.shared ? nullptr : &coef_t, moved.data);
    return use_table(std::move(table), 2 * m);
  }
  std::vector<double> joined;
  for (int64_t b = 0; b < rows; ++b) {
    const double *p = parameter_row(b), *t = moved.data + (moved.shared ? 0 : b * m);
    joined.insert(joined.end(), p, p + m);
    joined.insert(joined.end(), t, t + m);
  }
  use_values(std::move(joined), 2 * m, shared);
}

void FrameLauncher::zero_parameter(int64_t column) {
  const bool shared = call.parameter_stride == 0;
  const int64_t rows = shared ? 1 : call.batch;
  if (gpu_ && !shared) {
    Tensor table = empty_scalars(state_, rows, columns_);
    write_columns(table, 0, columns_, coef_, nullptr);
    fill(columns_of(table, column, 1), 0.0);
    return use_table(std::move(table), columns_);
  }
  std::vector<double> copy(call.parameters, call.parameters + rows * columns_);
  for (int64_t b = 0; b < rows; ++b) copy[static_cast<size_t>(b * columns_ + column)] = 0.0;
  use_values(std::move(copy), columns_, shared);
}

void FrameLauncher::noise(const std::optional<Tensor>& seed) {
  if (!seed.has_value()) return;
  int32_t dtype = 0;
  aoti_torch_get_dtype(seed->get(), &dtype);
  if (dtype != aoti_torch_dtype_int64()) type_error(op_, "seed", "be an int64 tensor", dtype_name(*seed));
  const View view = view_of(*seed, DType::f64);
  const bool shared = view.dims == 1 && view.sizes[0] == 2;
  const bool each = view.dims == 2 && view.sizes[0] == call.batch && view.sizes[1] == 2;
  if (!shared && !each) value_error(op_, "seed", join("have shape [2] or [", call.batch, ", 2]"), view.shape());
  if (!view.same_device(state_)) {
    value_error(op_, "seed", join("be on the data's device (", state_.device(), ")"), view.device());
  }
  if (view.strides[view.dims - 1] != 1 || (each && view.strides[0] != 2)) {
    value_error(op_, "seed", "be contiguous", "strides with gaps");
  }
  call.seed = static_cast<const int64_t*>(view.data);
  call.seed_stride = shared ? 0 : 2;
  call.rows = call.streams + 1;
}

void FrameLauncher::append(Result result) {
  const View& view = result.written();
  call.output[call.outputs++] = {view.data, view.dtype, batch_stride(view, walk_, call.size)};
  if (!result_.has_value()) {
    result_.emplace(std::move(result));
  } else {
    more_results_.push_back(std::move(result));
  }
}

void FrameLauncher::output(DType dtype) {
  append(Result(state_, walk_, dtype));
}

void FrameLauncher::output_twice(DType dtype) {
  int64_t sizes[kMaxDims], strides[kMaxDims];
  std::copy_n(state_.sizes, state_.dims, sizes);
  std::copy_n(state_.strides, state_.dims, strides);
  View twice = state_;
  twice.sizes = sizes;
  twice.strides = strides;
  Walk walk = walk_;
  walk.first_is_dense = walk_.first_is_dense && (sizes[0] == 1 || strides[0] == call.size);  // samples in a row
  sizes[0] *= 2;
  strides[0] = call.size;
  append(Result(twice, walk, dtype));
  Output second = call.output[call.outputs - 1];
  second.data = static_cast<char*>(second.data) + call.batch * call.size * size_of(dtype);
  call.output[call.outputs++] = second;
}

void FrameLauncher::output(const Tensor& out) {
  const View view = floating_view(op_, "out", out);
  const auto first = [this] { return label(first_name_, first_index_); };
  if (!view.same_shape(state_)) {
    value_error(op_, "out", join("have the shape of ", first(), " (", state_.shape(), ")"), view.shape());
  }
  if (view.dtype != state_.dtype) {
    type_error(op_, "out", join("have the dtype of ", first(), " (", name_of(state_.dtype), ")"), name_of(view.dtype));
  }
  if (!view.same_device(state_)) {
    value_error(op_, "out", join("be on the device of ", first(), " (", state_.device(), ")"), view.device());
  }
  check_writable(op_, view);
  for (int j = 0; j < call.streams; ++j) check_overlap(op_, view, inputs_[j]);
  append(Result(out, view, walk_));
}

Tensor FrameLauncher::scalars(int64_t columns) {
  Tensor t = empty_scalars(state_, call.batch, columns);
  call.scalars = static_cast<double*>(t.data());
  call.scalar_stride = columns;
  return t;
}

const double* FrameLauncher::parameter_row(int64_t b) const {
  return call.parameters + b * call.parameter_stride;
}

int64_t FrameLauncher::readable_rows() const {
  return !readable_ ? 0 : call.parameter_stride == 0 ? 1 : call.batch;
}

std::vector<Tensor> FrameLauncher::run() {
  run_frame(call, state_);
  std::vector<Tensor> outputs;
  if (result_.has_value()) outputs.push_back(result_->finish());
  for (Result& r : more_results_) outputs.push_back(r.finish());
  return outputs;
}

Tensor FrameLauncher::run_one() {
  run_frame(call, state_);
  return result_->finish();
}

}  // namespace marquardt
