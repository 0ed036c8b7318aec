// threshold_scale: s = clamp(quantile(|x|, ratio), 1, maximum) per sample. threshold_apply: clamp(x/s, −1, 1).
#include "core/register.h"
#include "frame/launch.h"
#include "select/run.h"

namespace marquardt {
namespace {

constexpr const char* kOp = "dynamic_threshold";  // the public function, in which both are called

void check_scalars(const FrameLauncher& launcher) {
  for (int64_t b = 0; b < launcher.readable_rows(); ++b) {
    const double ratio = launcher.parameter_row(b)[0], maximum = launcher.parameter_row(b)[1];
    if (!(ratio >= 0.0 && ratio <= 1.0)) value_error(kOp, "ratio", "be between 0 and 1", ratio);
    if (!(maximum >= 1.0)) value_error(kOp, "maximum", "be >= 1", maximum);
  }
}

// `coef` is (ratio, maximum); s is [B, 1].
Tensor threshold_scale(const Tensor& x, const Tensor& coef, int64_t batch_dims) {
  FrameLauncher launcher(kOp, "x0", x, -1, batch_dims, false);
  launcher.add_state();
  launcher.parameters(coef, 2);
  check_scalars(launcher);
  Tensor scale = launcher.scalars(1);
  const FrameCall& from = launcher.call;
  SelectCall call;
  call.data = from.stream[0].data;
  call.dtype = from.stream[0].dtype;
  call.batch = from.batch;
  call.size = from.size;
  call.batch_stride = from.stream[0].batch_stride;
  call.parameters = from.parameters;
  call.parameter_stride = from.parameter_stride;
  call.host_parameters = from.host_parameters;
  call.scale = from.scalars;
  run_select(call, launcher.state());
  return scale;
}

// `coef` is s, [1] or [B, 1].
Tensor apply_into(FrameLauncher& launcher, const Tensor& coef, Result result, const Walk& walk) {
  launcher.add_state();
  launcher.parameters(coef, 1);
  const FrameCall& from = launcher.call;
  const View& to = result.written();
  RescaleCall call;
  call.data = from.stream[0].data;
  call.dtype = from.stream[0].dtype;
  call.batch = from.batch;
  call.size = from.size;
  call.batch_stride = from.stream[0].batch_stride;
  call.out = to.data;
  call.out_stride = batch_stride(to, walk, from.size);
  call.scale = from.parameters;
  call.scale_stride = from.parameter_stride;
  call.host_scale = from.host_parameters;
  run_rescale(call, launcher.state());
  return result.finish();
}

Tensor threshold_apply(const Tensor& x, const Tensor& coef, int64_t batch_dims) {
  FrameLauncher launcher(kOp, "x0", x, -1, batch_dims, false);
  const Walk walk = Walk::of(launcher.state(), batch_dims, false);
  return apply_into(launcher, coef, Result(launcher.state(), walk, launcher.state().dtype), walk);
}

View writable_view(const Tensor& out, const View& x) {
  const View view = floating_view(kOp, "out", out);
  if (!view.same_shape(x)) value_error(kOp, "out", join("have the shape of x0 (", x.shape(), ")"), view.shape());
  if (view.dtype != x.dtype) {
    type_error(kOp, "out", join("have the dtype of x0 (", name_of(x.dtype), ")"), name_of(view.dtype));
  }
  if (!view.same_device(x)) value_error(kOp, "out", join("be on the device of x0 (", x.device(), ")"), view.device());
  check_writable(kOp, view);
  check_overlap(kOp, view, x);
  return view;
}

void threshold_apply_out(const Tensor& x, const Tensor& coef, int64_t batch_dims, const Tensor& out) {
  FrameLauncher launcher(kOp, "x0", x, -1, batch_dims, false);
  const View view = writable_view(out, launcher.state());
  const Walk walk = Walk::of(launcher.state(), batch_dims, false);
  apply_into(launcher, coef, Result(out, view, walk), walk);
}

void register_kernels(StableLibrary& m) {
  implement_both(m, "threshold_scale", TORCH_BOX(&threshold_scale));
  implement_both(m, "threshold_apply", TORCH_BOX(&threshold_apply));
  implement_both(m, "threshold_apply_out", TORCH_BOX(&threshold_apply_out));
}

}  // namespace
}  // namespace marquardt

STABLE_TORCH_LIBRARY_FRAGMENT(marquardt, m) {
  using marquardt::define_both;
  define_both(m, "threshold_scale", "(Tensor x, Tensor coef, int batch_dims) -> Tensor");
  define_both(m, "threshold_apply", "(Tensor x, Tensor coef, int batch_dims) -> Tensor");
  // Traced, `out` is a keyword, as torch wants it of an out variant.
  m.def("threshold_apply_out(Tensor x, Tensor coef, int batch_dims, *, Tensor(a!) out) -> ()");
  m.def("_threshold_apply_out(Tensor x, Tensor coef, int batch_dims, Tensor(a!) out) -> ()");
}

MQ_ON_EVERY_DEVICE(marquardt::register_kernels)
