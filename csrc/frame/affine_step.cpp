// affine_step: a weighted sum of vectors, and noise. No Gram; C is the coefficients themselves.
#include <tuple>

#include "core/register.h"
#include "frame/launch.h"

namespace marquardt {
namespace {

using MaybeTensor = std::optional<Tensor>;

constexpr int kMaxTerms = 8;  // and an explicit noise

void check_count(const std::vector<Tensor>& terms) {
  if (terms.empty() || terms.size() > kMaxTerms + 1) {
    value_error("affine_step", "terms", join("hold 1 to ", kMaxTerms, " tensors"), terms.size());
  }
}

void prepare(FrameLauncher& launcher, const std::vector<Tensor>& terms, const Tensor& coef, const MaybeTensor& seed) {
  launcher.add_state();
  for (size_t j = 1; j < terms.size(); ++j) launcher.add("terms", terms[j], static_cast<int>(j));
  launcher.call.op = FrameOp::affine;
  launcher.noise(seed);
  launcher.parameters(coef, static_cast<int64_t>(terms.size()) + (seed.has_value() ? 1 : 0));
}

Tensor affine_step(const std::vector<Tensor>& terms, const Tensor& coef, const MaybeTensor& seed, int64_t batch_dims) {
  check_count(terms);
  FrameLauncher launcher("affine_step", "terms", terms[0], 0, batch_dims, seed.has_value());
  prepare(launcher, terms, coef, seed);
  launcher.output(launcher.state().dtype);
  return launcher.run_one();
}

void affine_step_out(const std::vector<Tensor>& terms, const Tensor& coef, const MaybeTensor& seed, int64_t batch_dims,
                     const Tensor& out) {
  check_count(terms);
  FrameLauncher launcher("affine_step", "terms", terms[0], 0, batch_dims, seed.has_value());
  prepare(launcher, terms, coef, seed);
  launcher.output(out);
  launcher.run_one();
}

// Rows (grad, terms…, noise): d_term_j = c_j·grad, d_c_j = ⟨grad, row_j⟩.
std::tuple<std::vector<Tensor>, Tensor> backward(const Tensor& grad, const std::vector<Tensor>& terms,
                                                 const Tensor& coef, const MaybeTensor& seed, bool want_terms,
                                                 bool want_coef, int64_t batch_dims) {
  check_count(terms);
  const int64_t columns = static_cast<int64_t>(terms.size()) + (seed.has_value() ? 1 : 0);
  FrameLauncher launcher("affine_step", "terms", terms[0], 0, batch_dims, seed.has_value() && want_coef);
  launcher.add("grad", grad);
  if (want_coef) {
    for (size_t j = 0; j < terms.size(); ++j) launcher.add("terms", terms[j], static_cast<int>(j));
    launcher.noise(seed);
    launcher.call.gram = GramKind::first;
  }
  launcher.parameters(coef, columns);
  launcher.call.op = FrameOp::affine_backward;
  if (want_terms) {
    for (size_t j = 0; j < terms.size(); ++j) {
      launcher.output(floating_view("affine_step", "terms", terms[j], static_cast<int>(j)).dtype);
    }
  }
  Tensor d_coef;
  if (want_coef) {
    d_coef = launcher.scalars(columns);
  } else {
    const int64_t none = 0, one = 1;
    d_coef = empty_strided(launcher.state(), &none, &one, 1, DType::f64);
  }
  std::vector<Tensor> d_terms = launcher.run();
  return {std::move(d_terms), std::move(d_coef)};
}

void register_kernels(StableLibrary& m) {
  implement_both(m, "affine_step", TORCH_BOX(&affine_step));
  implement_both(m, "affine_step_out", TORCH_BOX(&affine_step_out));
  implement_both(m, "affine_step_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace marquardt

STABLE_TORCH_LIBRARY_FRAGMENT(marquardt, m) {
  using marquardt::define_both;
  define_both(m, "affine_step", "(Tensor[] terms, Tensor coef, Tensor? seed, int batch_dims) -> Tensor");
  define_both(m, "affine_step_backward",
              "(Tensor grad, Tensor[] terms, Tensor coef, Tensor? seed, bool want_terms, bool want_coef,"
              " int batch_dims) -> (Tensor[], Tensor)");
  // Traced, `out` is a keyword, as torch wants it of an out variant.
  m.def("affine_step_out(Tensor[] terms, Tensor coef, Tensor? seed, int batch_dims, *, Tensor(a!) out) -> ()");
  m.def("_affine_step_out(Tensor[] terms, Tensor coef, Tensor? seed, int batch_dims, Tensor(a!) out) -> ()");
}

MQ_ON_EVERY_DEVICE(marquardt::register_kernels)
