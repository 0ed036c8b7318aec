// The engine itself as operators: Gram and apply with every feature, and the scalar maps. Ops are built from these
// in tests and in compositions; a hot op has a launcher of its own beside this file.
#include <algorithm>

#include "core/register.h"
#include "frame/launch.h"
#include "frame/maps.h"
#include "frame/run.h"

namespace marquardt {
namespace {

using MaybeTensor = std::optional<Tensor>;

// A float64 matrix [rows, columns] of the host, or one per sample [B, rows, columns] beside the data: its numbers lie
// behind one another, in place or in a copy.
struct Matrix {
  const double* data = nullptr;
  int64_t rows = 0, columns = 0, stride = 0;
  std::vector<double> values;
  Tensor copy;  // on a GPU
};

Matrix matrix_of(const char* op, const char* argument, const Tensor& t, int64_t batch, const View* state) {
  const View view = floating_view(op, argument, t);
  if (view.dtype != DType::f64) type_error(op, argument, "be float64", name_of(view.dtype));
  const bool each = view.dims == 3;
  if ((view.dims != 2 && !each) || (each && view.sizes[0] != batch)) {
    value_error(op, argument, join("be a matrix, or one per sample (", batch, ")"), view.shape());
  }
  if (!each && !view.on_cpu()) {
    value_error(op, argument, "be on the CPU when it is shared by the batch", view.device());
  }
  if (each && state != nullptr && !view.same_device(*state)) {
    value_error(op, argument, join("be on the data's device (", state->device(), ")"), view.device());
  }
  Matrix m;
  m.rows = view.sizes[view.dims - 2];
  m.columns = view.sizes[view.dims - 1];
  m.stride = each ? m.rows * m.columns : 0;
  m.data = static_cast<const double*>(view.data);
  if (t.is_contiguous()) return m;
  if (each && state != nullptr && on_gpu(*state)) {
    const int64_t strides[3] = {m.stride, m.columns, 1};
    m.copy = empty_strided(*state, view.sizes, strides, 3, DType::f64);
    m.copy.copy_from(t);
    m.data = static_cast<const double*>(m.copy.data());
    return m;
  }
  const int64_t count = each ? batch : 1;
  for (int64_t b = 0; b < count; ++b)
    for (int64_t i = 0; i < m.rows; ++i)
      for (int64_t j = 0; j < m.columns; ++j)
        m.values.push_back(m.data[(each ? b * view.strides[0] : 0) + i * view.strides[view.dims - 2] +
                                  j * view.strides[view.dims - 1]]);
  m.data = m.values.data();
  return m;
}

// Streams, virtual rows, prologue and clamp of a generic call; `prologue` and `clamp` outlive it.
void prepare(FrameLauncher& launcher, const char* op, const std::vector<Tensor>& streams, bool ones,
             const MaybeTensor& seed, const Matrix& prologue, const Matrix& clamp) {
  FrameCall& call = launcher.call;
  launcher.add_state();
  for (size_t j = 1; j < streams.size(); ++j) launcher.add("streams", streams[j], static_cast<int>(j));
  call.ones = ones;
  launcher.noise(seed);
  const int64_t vectors = call.streams + (ones ? 1 : 0) + (seed.has_value() ? 1 : 0);
  if (vectors > kMaxVectors) value_error(op, "streams", join("make at most ", kMaxVectors, " vectors"), vectors);
  call.rows = static_cast<int>(vectors);
  if (prologue.rows > 0) {
    if (prologue.columns != vectors || prologue.rows > kMaxVectors) {
      value_error(op, "prologue", join("be a matrix of ", vectors, " columns and at most ", kMaxVectors, " rows"),
                  join("[", prologue.rows, ", ", prologue.columns, "]"));
    }
    call.prologue = prologue.data;
    call.prologue_stride = prologue.stride;
    call.rows = static_cast<int>(prologue.rows);
  }
  if (clamp.rows > 0) {
    if (clamp.rows != call.rows || clamp.columns != 2 || clamp.stride != 0) {
      value_error(op, "clamp", join("have shape [", call.rows, ", 2]"),
                  join("[", clamp.rows, ", ", clamp.columns, "]"));
    }
    call.clamp = clamp.data;
  }
}

void check_streams(const char* op, const std::vector<Tensor>& streams) {
  if (streams.empty() || streams.size() > kMaxVectors) {
    value_error(op, "streams", join("hold 1 to ", kMaxVectors, " tensors"), streams.size());
  }
}

Tensor frame_gram(const std::vector<Tensor>& streams, const MaybeTensor& prologue, const MaybeTensor& clamp,
                  const MaybeTensor& seed, bool ones, bool exact, int64_t batch_dims) {
  const char* op = "_frame_gram";
  check_streams(op, streams);
  FrameLauncher launcher(op, "streams", streams[0], 0, batch_dims, seed.has_value());
  FrameCall& call = launcher.call;
  const Matrix l =
      prologue.has_value() ? matrix_of(op, "prologue", *prologue, call.batch, &launcher.state()) : Matrix{};
  const Matrix bounds = clamp.has_value() ? matrix_of(op, "clamp", *clamp, call.batch, &launcher.state()) : Matrix{};
  prepare(launcher, op, streams, ones, seed, l, bounds);
  call.gram = GramKind::full;
  call.exact = exact;
  const double nothing = 0.0;  // no outputs, no parameters
  call.parameters = &nothing;
  call.host_parameters = true;
  const int64_t k = call.rows, sizes[3] = {call.batch, k, k}, strides[3] = {k * k, k, 1};
  Tensor gram = empty_strided(launcher.state(), sizes, strides, 3, DType::f64);
  call.scalars = static_cast<double*>(gram.data());
  call.scalar_stride = k * k;
  launcher.run();
  return gram;
}

std::vector<Tensor> frame_apply(const std::vector<Tensor>& streams, const Tensor& c, const MaybeTensor& prologue,
                                const MaybeTensor& clamp, const MaybeTensor& seed, bool ones, int64_t batch_dims) {
  const char* op = "_frame_apply";
  check_streams(op, streams);
  FrameLauncher launcher(op, "streams", streams[0], 0, batch_dims, seed.has_value());
  FrameCall& call = launcher.call;
  const Matrix l =
      prologue.has_value() ? matrix_of(op, "prologue", *prologue, call.batch, &launcher.state()) : Matrix{};
  const Matrix bounds = clamp.has_value() ? matrix_of(op, "clamp", *clamp, call.batch, &launcher.state()) : Matrix{};
  const Matrix matrix = matrix_of(op, "c", c, call.batch, &launcher.state());
  prepare(launcher, op, streams, ones, seed, l, bounds);
  if (matrix.columns != call.rows || matrix.rows < 1 || matrix.rows > kMaxOutputs) {
    value_error(op, "c", join("have ", call.rows, " columns and 1 to ", kMaxOutputs, " rows"),
                join("[", matrix.rows, ", ", matrix.columns, "]"));
  }
  call.parameters = matrix.data;
  call.parameter_stride = matrix.stride;
  call.parameter_count = static_cast<int>(matrix.rows * matrix.columns);
  call.host_parameters = matrix.stride == 0;
  for (int64_t i = 0; i < matrix.rows; ++i) launcher.output(launcher.state().dtype);
  return launcher.run();
}

// The scalar maps, row by row; see maps.h for what the columns are.
Tensor frame_map_rows(int64_t op, int64_t mode, const Tensor& gram, const Tensor& coef) {
  const char* name = "_frame_map";
  if (op < 1 || op > 3) value_error(name, "op", "be 1, 2 or 3", op);
  if (mode < 0 || mode > 2) value_error(name, "variant", "be 0, 1 or 2", mode);
  const int m = lm_parameters(static_cast<int>(mode));
  const Matrix g = matrix_of(name, "gram", gram, 0, nullptr), p = matrix_of(name, "coef", coef, 0, nullptr);
  if (g.stride != 0 || p.stride != 0) value_error(name, "gram", "be a matrix, as coef", "three dimensions");
  const int64_t columns = op == 1 ? 3 : op == 2 ? 5 : 6, parameters = op == 3 ? 2 * m : m;
  if (g.columns != columns) value_error(name, "gram", join("have ", columns, " columns"), g.columns);
  if (p.columns != parameters || p.rows != g.rows) {
    value_error(name, "coef", join("have shape [", g.rows, ", ", parameters, "]"),
                join("[", p.rows, ", ", p.columns, "]"));
  }
  const int64_t width = op == 1 ? 2 : op == 2 ? 6 + m : 4;
  Tensor out = empty_scalars(view_of(gram, DType::f64), g.rows, width);
  double* to = static_cast<double*>(out.data());
  FrameCall call;
  call.op = static_cast<FrameOp>(op);
  call.mode = static_cast<int>(mode);
  call.rows = static_cast<int>(op) + 1;
  call.outputs = op == 2 ? 2 : 1;
  for (int64_t b = 0; b < g.rows; ++b, to += width) {
    const double* row = g.data + b * columns;
    double packed[kMaxGram] = {};
    std::copy_n(row, columns, packed);
    if (op == 3) {  // the columns are (n, e, R) and their tangents
      const double entries[8] = {row[0], row[1], row[2], 0.5 * row[3], row[4], 0.0, 0.0, 0.5 * row[5]};
      std::copy_n(entries, 8, packed);
    }
    FrameMap map = {};
    frame_map(call, packed, p.data + b * parameters, map, op == 2 ? to + 6 : nullptr);
    if (op == 2) {
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 3; ++j) to[3 * i + j] = map.zero >> i & 1u ? 0.0 : map.c[i][j];
    } else {
      for (int j = 0; j < (op == 1 ? 2 : 4); ++j) to[j] = map.c[0][j];
    }
  }
  return out;
}

void register_kernels(StableLibrary& m) {
  m.impl("_frame_gram", TORCH_BOX(&frame_gram));
  m.impl("_frame_apply", TORCH_BOX(&frame_apply));
}

}  // namespace
}  // namespace marquardt

STABLE_TORCH_LIBRARY_FRAGMENT(marquardt, m) {
  m.def(
      "_frame_gram(Tensor[] streams, Tensor? prologue, Tensor? clamp, Tensor? seed, bool ones, bool exact,"
      " int batch_dims) -> Tensor");
  m.def(
      "_frame_apply(Tensor[] streams, Tensor c, Tensor? prologue, Tensor? clamp, Tensor? seed, bool ones,"
      " int batch_dims) -> Tensor[]");
  m.def("_frame_map(int op, int variant, Tensor gram, Tensor coef) -> Tensor");
}

MQ_ON_EVERY_DEVICE(marquardt::register_kernels)

STABLE_TORCH_LIBRARY_IMPL(marquardt, CPU, m) {
  m.impl("_frame_map", TORCH_BOX(&marquardt::frame_map_rows));
}
