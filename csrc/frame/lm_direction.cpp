// lm_direction: schema, checks, and its three calls of the frame engine (value, vector–Jacobian and
// Jacobian–vector product). The formula is in maps.h.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "frame/launch.h"
#include "frame/maps.h"

namespace marquardt {
namespace {

using MaybeTensor = std::optional<Tensor>;
using Values = std::vector<double>;

void check_mode(const char* op, int64_t mode) {
  if (mode < 0 || mode > 2) value_error(op, "mode", "be 0, 1 or 2", mode);
}

void check_scalars(const char* op, const FrameLauncher& launcher, int64_t mode) {
  for (int64_t b = 0; b < launcher.parameter_rows(); ++b) {
    const double* p = launcher.parameter_row(b);
    if (mode == kExtrapolate) {
      if (!std::isfinite(p[0])) value_error(op, "extrapolation", "be finite", p[0]);
      continue;
    }
    if (!(p[0] >= 0.0) || !std::isfinite(p[0])) value_error(op, "damping", "be finite and >= 0", p[0]);
    if (!std::isfinite(p[1])) value_error(op, "kappa", "be finite", p[1]);
  }
}

// Whether one κ (or γ) for the whole batch is 0: then prev is not even looked at.
bool never_reads_prev(const FrameLauncher& launcher, int mode) {
  return launcher.call.parameter_stride == 0 && !lm_reads_prev(mode, launcher.call.parameters);
}

void prepare(FrameLauncher& launcher, const MaybeTensor& prev, const MaybeTensor& coef, const Values& values,
             int64_t mode) {
  const char* op = "lm_direction";
  check_mode(op, mode);
  launcher.call.op = FrameOp::lm_direction;
  launcher.call.mode = static_cast<int>(mode);
  launcher.add_state();
  if (prev.has_value()) launcher.add("prev", *prev);
  launcher.parameters(coef, values, lm_parameters(static_cast<int>(mode)));
  check_scalars(op, launcher, mode);
}

void finish_plan(FrameLauncher& launcher) {
  FrameCall& call = launcher.call;
  if (call.rows == 2 && never_reads_prev(launcher, call.mode)) call.rows = call.streams = 1;
  call.pairs = call.rows == 2 ? 1 : 0;
  const bool plain = call.mode == kPlain;
  call.gram = call.rows == 2 || plain ? GramKind::full : GramKind::none;
}

// Without prev there is nothing to mix, whatever κ says.
Values without_prev(const MaybeTensor& prev, const Values& values, int64_t mode) {
  Values used = values;
  if (!prev.has_value() && !used.empty() && mode >= 0 && mode <= 2) used.back() = 0.0;
  return used;
}

Tensor lm_direction_raw(const Tensor& eps, const MaybeTensor& prev, const MaybeTensor& coef, const Values& values,
                        int64_t mode, int64_t batch_dims) {
  FrameLauncher launcher("lm_direction", "eps", eps, -1, batch_dims, false);
  prepare(launcher, prev, coef, without_prev(prev, values, mode), mode);
  finish_plan(launcher);
  launcher.output(launcher.state().dtype);
  return launcher.run()[0];
}

void lm_direction_raw_out(const Tensor& eps, const MaybeTensor& prev, const MaybeTensor& coef, const Values& values,
                          int64_t mode, int64_t batch_dims, const Tensor& out) {
  FrameLauncher launcher("lm_direction", "eps", eps, -1, batch_dims, false);
  prepare(launcher, prev, coef, without_prev(prev, values, mode), mode);
  launcher.output(out);
  finish_plan(launcher);
  launcher.run();
}

Tensor lm_direction(const Tensor& eps, const MaybeTensor& prev, const Tensor& coef, int64_t mode, int64_t batch_dims) {
  return lm_direction_raw(eps, prev, coef, {}, mode, batch_dims);
}

void lm_direction_out(const Tensor& eps, const MaybeTensor& prev, const Tensor& coef, int64_t mode, int64_t batch_dims,
                      const Tensor& out) {
  lm_direction_raw_out(eps, prev, coef, {}, mode, batch_dims, out);
}

std::tuple<Tensor, Tensor, Tensor> backward_raw(const Tensor& grad, const Tensor& eps, const Tensor& prev,
                                                const MaybeTensor& coef, const Values& values, int64_t mode,
                                                int64_t batch_dims) {
  FrameLauncher launcher("lm_direction", "eps", eps, -1, batch_dims, false);
  prepare(launcher, prev, coef, values, mode);
  const DType prev_dtype = floating_view("lm_direction", "prev", prev).dtype;
  launcher.add("grad", grad);
  FrameCall& call = launcher.call;
  call.op = FrameOp::lm_direction_backward;
  call.pairs = 1;
  call.gram = GramKind::full;
  launcher.output(launcher.state().dtype);
  launcher.output(prev_dtype);
  Tensor d_coef = launcher.scalars(lm_parameters(call.mode));
  const std::vector<Tensor> outputs = launcher.run();
  return {outputs[0], outputs[1], d_coef};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& eps, const Tensor& prev,
                                            const Tensor& coef, int64_t mode, int64_t batch_dims) {
  return backward_raw(grad, eps, prev, coef, {}, mode, batch_dims);
}

Tensor jvp_raw(const Tensor& eps, const Tensor& prev, const MaybeTensor& coef, const Values& values,
               const Tensor& eps_t, const Tensor& prev_t, const MaybeTensor& coef_t, const Values& values_t,
               int64_t mode, int64_t batch_dims) {
  FrameLauncher launcher("lm_direction", "eps", eps, -1, batch_dims, false);
  FrameLauncher tangent("lm_direction", "eps_t", eps_t, -1, batch_dims, false);
  prepare(launcher, prev, coef, values, mode);
  const int columns = lm_parameters(static_cast<int>(mode));
  tangent.parameters(coef_t, values_t, columns, "coef_t");
  launcher.add("eps_t", eps_t);
  launcher.add("prev_t", prev_t);

  // One row of parameters: the scalars, then their tangents; per sample if either is.
  FrameCall& call = launcher.call;
  const int64_t rows = std::max(launcher.parameter_rows(), tangent.parameter_rows());
  Values joined(static_cast<size_t>(rows * 2 * columns));
  for (int64_t b = 0; b < rows; ++b)
    for (int j = 0; j < columns; ++j) {
      joined[static_cast<size_t>(b * 2 * columns + j)] = launcher.parameter_row(b)[j];
      joined[static_cast<size_t>(b * 2 * columns + columns + j)] = tangent.parameter_row(b)[j];
    }
  call.parameters = joined.data();
  call.parameter_stride = rows == 1 ? 0 : 2 * columns;
  call.op = FrameOp::lm_direction_jvp;
  call.pairs = 2;
  call.gram = GramKind::full;
  launcher.output(launcher.state().dtype);
  return launcher.run()[0];
}

Tensor jvp(const Tensor& eps, const Tensor& prev, const Tensor& coef, const Tensor& eps_t, const Tensor& prev_t,
           const Tensor& coef_t, int64_t mode, int64_t batch_dims) {
  return jvp_raw(eps, prev, coef, {}, eps_t, prev_t, coef_t, {}, mode, batch_dims);
}

}  // namespace
}  // namespace marquardt

STABLE_TORCH_LIBRARY_FRAGMENT(marquardt, m) {
  m.def("lm_direction(Tensor eps, Tensor? prev, Tensor coef, int mode, int batch_dims) -> Tensor");
  m.def("lm_direction_out(Tensor eps, Tensor? prev, Tensor coef, int mode, int batch_dims, *, Tensor(a!) out) -> ()");
  m.def(
      "lm_direction_backward(Tensor grad, Tensor eps, Tensor prev, Tensor coef, int mode, int batch_dims)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "lm_direction_jvp(Tensor eps, Tensor prev, Tensor coef, Tensor eps_t, Tensor prev_t, Tensor coef_t, int mode,"
      " int batch_dims) -> Tensor");
  // The same without autograd and with host scalars, for eager calls.
  m.def(
      "_lm_direction(Tensor eps, Tensor? prev, Tensor? coef, float[] values, int mode, int batch_dims) -> Tensor");
  m.def(
      "_lm_direction_out(Tensor eps, Tensor? prev, Tensor? coef, float[] values, int mode, int batch_dims,"
      " Tensor(a!) out) -> ()");
  m.def(
      "_lm_direction_backward(Tensor grad, Tensor eps, Tensor prev, Tensor? coef, float[] values, int mode,"
      " int batch_dims) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_lm_direction_jvp(Tensor eps, Tensor prev, Tensor? coef, float[] values, Tensor eps_t, Tensor prev_t,"
      " Tensor? coef_t, float[] values_t, int mode, int batch_dims) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(marquardt, CPU, m) {
  m.impl("lm_direction", TORCH_BOX(&marquardt::lm_direction));
  m.impl("lm_direction_out", TORCH_BOX(&marquardt::lm_direction_out));
  m.impl("lm_direction_backward", TORCH_BOX(&marquardt::backward));
  m.impl("lm_direction_jvp", TORCH_BOX(&marquardt::jvp));
  m.impl("_lm_direction", TORCH_BOX(&marquardt::lm_direction_raw));
  m.impl("_lm_direction_out", TORCH_BOX(&marquardt::lm_direction_raw_out));
  m.impl("_lm_direction_backward", TORCH_BOX(&marquardt::backward_raw));
  m.impl("_lm_direction_jvp", TORCH_BOX(&marquardt::jvp_raw));
}
