// lm_direction: schema, checks, and its three calls of the frame engine (value, vector–Jacobian and
// Jacobian–vector product). The formula is in maps.h.
#include <cmath>
#include <tuple>

#include "core/register.h"
#include "frame/launch.h"
#include "frame/maps.h"

namespace marquardt {
namespace {

using MaybeTensor = std::optional<Tensor>;

void check_mode(const char* op, int64_t mode) {
  if (mode < 0 || mode > 2) value_error(op, "variant", "be 0, 1 or 2", mode);
}

// Of those that the host knows: on a GPU a bad number spoils its sample and nothing is raised.
void check_scalars(const char* op, const FrameLauncher& launcher, int64_t mode) {
  for (int64_t b = 0; b < launcher.readable_rows(); ++b) {
    const double* p = launcher.parameter_row(b);
    if (mode == kExtrapolate) {
      if (!std::isfinite(p[0])) value_error(op, "extrapolation", "be finite", p[0]);
      continue;
    }
    if (!(p[0] >= 0.0) || !std::isfinite(p[0])) value_error(op, "damping", "be finite and >= 0", p[0]);
    if (!std::isfinite(p[1])) value_error(op, "kappa", "be finite", p[1]);
  }
}

// Whether one κ (or γ) for the whole batch, which the host then knows, is 0: prev is not even looked at.
bool never_reads_prev(const FrameLauncher& launcher, int mode) {
  return launcher.call.parameter_stride == 0 && !lm_reads_prev(mode, launcher.call.parameters);
}

void prepare(FrameLauncher& launcher, const MaybeTensor& prev, const Tensor& coef, int64_t mode) {
  const char* op = "lm_direction";
  check_mode(op, mode);
  launcher.call.op = FrameOp::lm_direction;
  launcher.call.mode = static_cast<int>(mode);
  launcher.add_state();
  if (prev.has_value()) launcher.add("prev", *prev);
  launcher.parameters(coef, lm_parameters(static_cast<int>(mode)));
  check_scalars(op, launcher, mode);
  if (!prev.has_value()) launcher.zero_parameter(lm_parameters(static_cast<int>(mode)) - 1);  // nothing to mix
}

void finish_plan(FrameLauncher& launcher) {
  FrameCall& call = launcher.call;
  if (call.rows == 2 && never_reads_prev(launcher, call.mode)) call.rows = call.streams = 1;
  call.pairs = call.rows == 2 ? 1 : 0;
  const bool plain = call.mode == kPlain;
  call.gram = call.rows == 2 || plain ? GramKind::full : GramKind::none;
}

Tensor lm_direction(const Tensor& eps, const MaybeTensor& prev, const Tensor& coef, int64_t mode, int64_t batch_dims) {
  FrameLauncher launcher("lm_direction", "eps", eps, -1, batch_dims, false);
  prepare(launcher, prev, coef, mode);
  finish_plan(launcher);
  launcher.output(launcher.state().dtype);
  return launcher.run_one();
}

void lm_direction_out(const Tensor& eps, const MaybeTensor& prev, const Tensor& coef, int64_t mode, int64_t batch_dims,
                      const Tensor& out) {
  FrameLauncher launcher("lm_direction", "eps", eps, -1, batch_dims, false);
  prepare(launcher, prev, coef, mode);
  launcher.output(out);
  finish_plan(launcher);
  launcher.run_one();
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& eps, const Tensor& prev,
                                            const Tensor& coef, int64_t mode, int64_t batch_dims) {
  FrameLauncher launcher("lm_direction", "eps", eps, -1, batch_dims, false);
  prepare(launcher, prev, coef, mode);
  launcher.add("grad", grad);
  FrameCall& call = launcher.call;
  call.op = FrameOp::lm_direction_backward;
  call.pairs = 1;
  call.gram = GramKind::full;
  call.exact = true;  // |d_eps| may be a hundredth of |grad|: errors of the Gram count a hundredfold
  launcher.output(launcher.state().dtype);
  launcher.output(launcher.dtype_of(1));
  Tensor d_coef = launcher.scalars(lm_parameters(call.mode));
  const std::vector<Tensor> outputs = launcher.run();
  return {outputs[0], outputs[1], d_coef};
}

Tensor jvp(const Tensor& eps, const Tensor& prev, const Tensor& coef, const Tensor& eps_t, const Tensor& prev_t,
           const Tensor& coef_t, int64_t mode, int64_t batch_dims) {
  FrameLauncher launcher("lm_direction", "eps", eps, -1, batch_dims, false);
  prepare(launcher, prev, coef, mode);
  launcher.tangents(coef_t);
  launcher.add("eps_t", eps_t);
  launcher.add("prev_t", prev_t);
  FrameCall& call = launcher.call;
  call.op = FrameOp::lm_direction_jvp;
  call.pairs = 2;
  call.gram = GramKind::full;
  call.exact = true;
  launcher.output(launcher.state().dtype);
  return launcher.run_one();
}

void register_kernels(StableLibrary& m) {
  implement_both(m, "lm_direction", TORCH_BOX(&lm_direction));
  implement_both(m, "lm_direction_out", TORCH_BOX(&lm_direction_out));
  implement_both(m, "lm_direction_backward", TORCH_BOX(&backward));
  implement_both(m, "lm_direction_jvp", TORCH_BOX(&jvp));
}

}  // namespace
}  // namespace marquardt

STABLE_TORCH_LIBRARY_FRAGMENT(marquardt, m) {
  using marquardt::define_both;
  define_both(m, "lm_direction", "(Tensor eps, Tensor? prev, Tensor coef, int variant, int batch_dims) -> Tensor");
  define_both(m, "lm_direction_backward",
              "(Tensor grad, Tensor eps, Tensor prev, Tensor coef, int variant, int batch_dims)"
              " -> (Tensor, Tensor, Tensor)");
  define_both(m, "lm_direction_jvp",
              "(Tensor eps, Tensor prev, Tensor coef, Tensor eps_t, Tensor prev_t, Tensor coef_t, int variant,"
              " int batch_dims) -> Tensor");
  // Traced, `out` is a keyword, as torch wants it of an out variant.
  m.def(
      "lm_direction_out(Tensor eps, Tensor? prev, Tensor coef, int variant, int batch_dims, *, Tensor(a!) out) -> ()");
  m.def("_lm_direction_out(Tensor eps, Tensor? prev, Tensor coef, int variant, int batch_dims, Tensor(a!) out) -> ()");
}

MQ_ON_EVERY_DEVICE(marquardt::register_kernels)
