// lm_step: schema, checks, and its call of the frame engine. What the numbers mean is in step.h.
#include <cmath>
#include <tuple>

#include "core/register.h"
#include "frame/launch.h"
#include "frame/maps.h"

namespace marquardt {
namespace {

using MaybeTensor = std::optional<Tensor>;
constexpr const char* kOp = "lm_step";

enum Wanted : int64_t { kDirection = 1, kStateDirection = 2, kConverted = 4, kDoubled = 8, kGuided = 16 };

// Of those that the host knows; κ and λ count only where a direction of before is there.
void check_scalars(const FrameLauncher& launcher, int64_t variant) {
  for (int64_t b = 0; b < launcher.readable_rows(); ++b) {
    const double* p = launcher.parameter_row(b);
    if (variant == kSnr) {
      if (!(p[0] >= 0.0) || !std::isfinite(p[0])) value_error(kOp, "snr", "be finite and >= 0", p[0]);
      if (!(p[1] >= 0.0) || !std::isfinite(p[1])) value_error(kOp, "temperature", "be finite and >= 0", p[1]);
    } else if (variant == kExtrapolate) {
      if (!std::isfinite(p[0])) value_error(kOp, "extrapolation", "be finite", p[0]);
    } else {
      if (!(p[0] >= 0.0) || !std::isfinite(p[0])) value_error(kOp, "damping", "be finite and >= 0", p[0]);
      if (!std::isfinite(p[1])) value_error(kOp, "kappa", "be finite", p[1]);
    }
  }
}

void check_form(const std::vector<Tensor>& outputs, const MaybeTensor& prev, const MaybeTensor& seed, int64_t variant,
                int64_t wanted, bool clipped, int64_t batch_dims) {
  if (outputs.size() > kMaxSources - 1) {
    value_error(kOp, "outputs", join("hold at most ", kMaxSources - 1, " tensors"), outputs.size());
  }
  if (variant != kKeepNorm && variant != kExtrapolate && variant != kSnr)
    value_error(kOp, "variant", "be 0, 2 or 3", variant);
  if (wanted < 0 || wanted > 31 || (wanted & 3) == 3)
    value_error(kOp, "wanted", "be a sum of 1 or 2, 4, 8 and 16", wanted);
  if ((wanted & kGuided) != 0 && outputs.size() < 2)
    value_error(kOp, "outputs", "hold two tensors of a guided model", outputs.size());
  if ((wanted & kConverted) != 0 && !clipped) value_error(kOp, "wanted", "ask for y of a clipped step alone", wanted);
  if ((wanted & kDoubled) != 0 && batch_dims != 1) value_error(kOp, "doubled", "come with batch_dims=1", batch_dims);
  if (variant == kSnr && prev.has_value() == seed.has_value())
    value_error(kOp, "snr", "come with noise or a seed", prev.has_value() ? "both" : "neither");
}

// Drops p where one number for the whole batch, which the host then knows, leaves it unread.
void settle(FrameLauncher& launcher) {
  FrameCall& call = launcher.call;
  const StepShape shape = step_shape(call);
  if (shape.has_prev && call.parameter_stride == 0 && !step_reads_prev(call, shape, call.parameters)) --call.streams;
  call.gram = step_shape(call).has_prev ? GramKind::full : GramKind::none;
  call.rows = kStepRows;
}

// What is not wanted: [B, 0], or [0] without a batch.
Tensor nothing(const FrameLauncher& launcher, int64_t batch_dims) {
  const int64_t sizes[2] = {launcher.call.batch, 0}, strides[2] = {1, 1};
  const int64_t skip = batch_dims == 1 ? 0 : 1;
  return empty_strided(launcher.state(), sizes + skip, strides + skip, 2 - skip, launcher.state().dtype);
}

std::tuple<Tensor, Tensor, Tensor> lm_step(const Tensor& sample, const std::vector<Tensor>& outputs,
                                           const MaybeTensor& prev, const Tensor& coef, const MaybeTensor& seed,
                                           int64_t variant, int64_t wanted, bool clipped, int64_t batch_dims) {
  check_form(outputs, prev, seed, variant, wanted, clipped, batch_dims);
  FrameLauncher launcher(kOp, "sample", sample, -1, batch_dims, seed.has_value());
  FrameCall& call = launcher.call;
  call.op = FrameOp::lm_step;
  call.mode = static_cast<int>(variant);
  call.sources = 1 + static_cast<int>(outputs.size());
  call.clipped = clipped;
  call.guided = (wanted & kGuided) != 0;
  launcher.add_state();
  for (size_t j = 0; j < outputs.size(); ++j) launcher.add("outputs", outputs[j], static_cast<int>(j));
  const DType model = launcher.dtype_of(outputs.empty() ? 0 : 1);
  if (prev.has_value()) launcher.add("prev", *prev);
  launcher.noise(seed);
  launcher.parameters(coef, step_shape(call).parameters());
  check_scalars(launcher, variant);
  settle(launcher);

  const bool doubled = (wanted & kDoubled) != 0, direction = (wanted & (kDirection | kStateDirection)) != 0;
  call.step_outputs = doubled ? 2 : 1;
  call.step_direction = direction;
  call.step_converted = (wanted & kConverted) != 0;
  if (doubled) {
    launcher.output_twice(launcher.state().dtype);
  } else {
    launcher.output(launcher.state().dtype);
  }
  if (direction) launcher.output((wanted & kStateDirection) != 0 ? launcher.state().dtype : model);
  if (call.step_converted) launcher.output(model);
  std::vector<Tensor> written = launcher.run();
  size_t next = 0;
  Tensor first = std::move(written[next++]);
  Tensor second = direction ? std::move(written[next++]) : nothing(launcher, batch_dims);
  Tensor third = call.step_converted ? std::move(written[next++]) : nothing(launcher, batch_dims);
  return {std::move(first), std::move(second), std::move(third)};
}

void register_kernels(StableLibrary& m) {
  implement_both(m, "lm_step", TORCH_BOX(&lm_step));
}

}  // namespace
}  // namespace marquardt

STABLE_TORCH_LIBRARY_FRAGMENT(marquardt, m) {
  marquardt::define_both(m, "lm_step",
                         "(Tensor sample, Tensor[] outputs, Tensor? prev, Tensor coef, Tensor? seed, int variant,"
                         " int wanted, bool clipped, int batch_dims) -> (Tensor, Tensor, Tensor)");
}

MQ_ON_EVERY_DEVICE(marquardt::register_kernels)
