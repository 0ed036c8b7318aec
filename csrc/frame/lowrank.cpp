// The damped low-rank Hessian H = λI + U diag(s) Uᵀ: schemas, checks, and the calls of the frame engine. The rows of U
// are vectors of the frame; the formulas are in lowrank_maps.h.
#include <cmath>
#include <tuple>

#include "core/register.h"
#include "frame/launch.h"
#include "frame/maps.h"

namespace marquardt {
namespace {

constexpr int kMaxRank = kMaxVectors - 2;

const char* name_of_variant(int64_t variant) {
  static const char* const kNames[] = {"lowrank_matvec", "lowrank_solve", "lowrank_inv_sqrt"};
  if (variant < 0 || variant > 2) value_error("lowrank_apply", "variant", "be 0, 1 or 2", variant);
  return kNames[variant];
}

// Whether s_j is refused: NaN that belongs to one sample of many is data, as an update of bad data leaves it.
bool bad_weight(const FrameLauncher& launcher, double s) {
  return std::isnan(s) ? launcher.call.parameter_stride == 0 : std::isinf(s);
}

// Of those that the host knows: on a GPU a bad number spoils its sample and nothing is raised.
void check_scalars(const char* op, const FrameLauncher& launcher, int k, bool positive) {
  for (int64_t b = 0; b < launcher.readable_rows(); ++b) {
    const double* p = launcher.parameter_row(b);
    if (!std::isfinite(p[0]) || p[0] < 0.0 || (positive && p[0] == 0.0))
      value_error(op, "damping", positive ? "be finite and > 0" : "be finite and >= 0", p[0]);
    for (int j = 0; j < k; ++j)
      if (bad_weight(launcher, p[1 + j])) value_error(op, "s", "be finite", p[1 + j]);
  }
}

// What a call of the family has in common: its rows are there already.
void describe(FrameLauncher& launcher, FrameOp op, int64_t mode) {
  FrameCall& call = launcher.call;
  call.op = op;
  call.mode = static_cast<int>(mode);
  call.exact = true;  // a solve follows: float32 products would leave 2e-2 where g lies in the span of U
  call.gram = lowrank_gram(op, call.mode);
  if (entries_of(call.gram, call.rows) == 0) call.gram = GramKind::none;
}

// info of every sample, a column of a float64 tensor on the CPU: the first bad sample is an error.
void check_definite(const char* op, const Tensor& info, int64_t columns, int64_t column) {
  const auto* data = static_cast<const double*>(info.data());
  const int64_t batch = columns == 0 ? 0 : info.numel() / columns;
  for (int64_t b = 0; b < batch; ++b) {
    const double found = data[b * columns + column];
    if (found == 0.0) continue;
    value_error(op, "H = damping·I + U diag(s) Uᵀ",
                join("be positive definite in every sample (or check=False be given, which makes such samples NaN)"),
                join("sample ", b, ", where row ", static_cast<int64_t>(found) - 1, " of U breaks it"));
  }
}

std::tuple<Tensor, Tensor> apply(const Tensor& v, const Tensor& basis, const Tensor& coef, int64_t variant, bool check,
                                 int64_t batch_dims) {
  const char* op = name_of_variant(variant);
  const char* argument = variant == kMatvec ? "v" : variant == kSolve ? "g" : "z";
  FrameLauncher launcher(op, argument, v, -1, batch_dims, false);
  launcher.add_state();
  const int k = launcher.add_stack("U", basis);
  describe(launcher, FrameOp::lowrank, variant);
  launcher.parameters(coef, 1 + k);
  check_scalars(op, launcher, k, variant != kMatvec);
  launcher.output(launcher.state().dtype);
  Tensor info = launcher.scalars(1);
  Tensor out = launcher.run_one();
  if (check && variant != kMatvec && launcher.state().on_cpu() && launcher.call.size > 0)
    check_definite(op, info, 1, 0);
  return {std::move(out), std::move(info)};
}

// Derivatives of ⟨grad, f(H) v⟩, rows (grad, v, U…): d_basis per sample, and those by (damping, s…) [B, 1 + k].
std::tuple<Tensor, Tensor> vjp(const Tensor& grad, const Tensor& v, const Tensor& basis, const Tensor& coef,
                               int64_t variant, int64_t batch_dims) {
  const char* op = name_of_variant(variant);
  FrameLauncher launcher(op, "grad", grad, -1, batch_dims, false);
  launcher.add_state();
  launcher.add("v", v);
  const int k = launcher.add_stack("U", basis);
  describe(launcher, FrameOp::lowrank_vjp, variant);
  launcher.parameters(coef, 1 + k);
  Tensor d_basis = launcher.output_stack(k, floating_view(op, "U", basis).dtype);
  Tensor d_coef = launcher.scalars(1 + k);
  launcher.run();
  return {std::move(d_basis), std::move(d_coef)};
}

int add_rows_alone(FrameLauncher& launcher, const char* op, const Tensor& basis) {
  const int k = launcher.add_stack("U", basis);
  if (k == 0) value_error(op, "U", "have at least one row", 0);
  return k;
}

// [B, 2]: log det H, info.
Tensor logdet(const Tensor& basis, const Tensor& coef, bool check, int64_t batch_dims) {
  const char* op = "lowrank_logdet";
  FrameLauncher launcher(op, "U", basis, batch_dims);
  const int k = add_rows_alone(launcher, op, basis);
  describe(launcher, FrameOp::lowrank_logdet, 0);
  launcher.parameters(coef, 1 + k);
  check_scalars(op, launcher, k, true);
  Tensor found = launcher.scalars(2);
  launcher.run();
  if (check && launcher.state().on_cpu()) check_definite(op, found, 2, 1);
  return found;
}

// `coef` is (damping, s…, gradient of log det), per sample.
std::tuple<Tensor, Tensor> logdet_backward(const Tensor& basis, const Tensor& coef, int64_t batch_dims) {
  const char* op = "lowrank_logdet";
  FrameLauncher launcher(op, "U", basis, batch_dims);
  const int k = add_rows_alone(launcher, op, basis);
  describe(launcher, FrameOp::lowrank_logdet_vjp, 0);
  launcher.parameters(coef, 2 + k);
  Tensor d_basis = launcher.output_stack(k, launcher.state().dtype);
  Tensor d_coef = launcher.scalars(1 + k);
  launcher.run();
  return {std::move(d_basis), std::move(d_coef)};
}

// `coef` is (decay, weight, s…): the new rows [B, rank, *sample] and the new s [B, rank].
std::tuple<Tensor, Tensor> update(const Tensor& v, const Tensor& basis, const Tensor& coef, int64_t rank,
                                  int64_t batch_dims) {
  const char* op = "lowrank_update";
  if (rank < 0 || rank > kMaxRank) value_error(op, "rank", join("be between 0 and ", kMaxRank), rank);
  FrameLauncher launcher(op, "v", v, -1, batch_dims, false);
  launcher.add_state();
  const int k = launcher.add_stack("U", basis);
  describe(launcher, FrameOp::lowrank_update, 0);
  launcher.parameters(coef, 2 + k);
  for (int64_t b = 0; b < launcher.readable_rows(); ++b) {
    const double* p = launcher.parameter_row(b);
    for (int j = 0; j < k + 2; ++j)
      if ((j < 2 ? !std::isfinite(p[j]) : bad_weight(launcher, p[j])) || p[j] < 0.0)
        value_error(op, j == 0 ? "decay" : j == 1 ? "weight" : "s", "be finite and >= 0", p[j]);
  }
  Tensor rows = launcher.output_stack(static_cast<int>(rank), launcher.state().dtype);
  Tensor s = launcher.scalars(rank);
  launcher.run();
  return {std::move(rows), std::move(s)};
}

void register_kernels(StableLibrary& m) {
  implement_both(m, "lowrank_apply", TORCH_BOX(&apply));
  implement_both(m, "lowrank_vjp", TORCH_BOX(&vjp));
  implement_both(m, "lowrank_logdet", TORCH_BOX(&logdet));
  implement_both(m, "lowrank_logdet_vjp", TORCH_BOX(&logdet_backward));
  implement_both(m, "lowrank_update", TORCH_BOX(&update));
}

}  // namespace
}  // namespace marquardt

STABLE_TORCH_LIBRARY_FRAGMENT(marquardt, m) {
  using marquardt::define_both;
  define_both(m, "lowrank_apply",
              "(Tensor v, Tensor basis, Tensor coef, int variant, bool check, int batch_dims) -> (Tensor, Tensor)");
  define_both(m, "lowrank_vjp",
              "(Tensor grad, Tensor v, Tensor basis, Tensor coef, int variant, int batch_dims) -> (Tensor, Tensor)");
  define_both(m, "lowrank_logdet", "(Tensor basis, Tensor coef, bool check, int batch_dims) -> Tensor");
  define_both(m, "lowrank_logdet_vjp", "(Tensor basis, Tensor coef, int batch_dims) -> (Tensor, Tensor)");
  define_both(m, "lowrank_update",
              "(Tensor v, Tensor basis, Tensor coef, int rank, int batch_dims) -> (Tensor, Tensor)");
}

MQ_ON_EVERY_DEVICE(marquardt::register_kernels)
