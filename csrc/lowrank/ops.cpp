// gram_pair: xᵀx and gᵀx in double. softmax_head_hvp: ((p⊙z − p Σ(p⊙z))ᵀ x)/n with z = x Gᵀ. On the CPU alone: on a GPU
// both ops are compositions over the vendor's matrix products.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "core/tensor.h"
#include "lowrank/gram.h"
#include "lowrank/softmax_head.h"

namespace marquardt {
namespace {

View matrix(const char* op, const char* argument, const Tensor& t) {
  const View view = floating_view(op, argument, t);
  if (view.dims != 2) value_error(op, argument, "have two dimensions", view.shape());
  return view;
}

void check_like(const char* op, const char* argument, const View& view, const char* first, const View& like) {
  if (view.dtype != like.dtype) {
    type_error(op, argument, join("have the dtype of ", first, " (", name_of(like.dtype), ")"), name_of(view.dtype));
  }
  if (!view.same_device(like)) {
    value_error(op, argument, join("be on the device of ", first, " (", like.device(), ")"), view.device());
  }
}

// The matrix, or a copy of it if the elements of a row do not follow one another.
Tensor with_rows(const Tensor& t, View& view) {
  return fitting(t, view, Walk::of(view, 1, true));
}

Rows rows_of(const View& view) {
  return {view.data, view.dtype, view.sizes[0] == 1 ? view.sizes[1] : view.strides[0], view.sizes[1]};
}

std::tuple<Tensor, Tensor> gram_pair(Tensor g, Tensor x) {
  const char* op = "gram_pair";
  View x_view = matrix(op, "x", x), g_view = matrix(op, "g", g);
  check_like(op, "g", g_view, "x", x_view);
  const int64_t rows = x_view.sizes[0], i = x_view.sizes[1], o = g_view.sizes[1];
  if (g_view.sizes[0] != rows) value_error(op, "g", join("have as many rows as x (", rows, ")"), g_view.shape());
  x = with_rows(x, x_view), g = with_rows(g, g_view);
  GramPair pair(rows_of(x_view), rows_of(g_view), rows);
  pair.run();
  const int64_t gram_sizes[2] = {i, i}, cross_sizes[2] = {o, i}, strides[2] = {i, 1};
  Tensor gram = empty_strided(x_view, gram_sizes, strides, 2, DType::f64);
  Tensor cross = empty_strided(x_view, cross_sizes, strides, 2, DType::f64);
  pair.write(static_cast<double*>(gram.data()), static_cast<double*>(cross.data()));
  return {std::move(gram), std::move(cross)};
}

Tensor head_hvp(Tensor x, Tensor p, Tensor g) {
  const char* op = "softmax_head_hvp";
  SoftmaxHead call{matrix(op, "x", x), matrix(op, "p", p), matrix(op, "G", g), {}};
  check_like(op, "p", call.p, "x", call.x);
  check_like(op, "G", call.g, "x", call.x);
  const int64_t n = call.x.sizes[0], d = call.x.sizes[1], c = call.p.sizes[1];
  if (call.p.sizes[0] != n) value_error(op, "p", join("have as many rows as x (", n, ")"), call.p.shape());
  if (call.g.sizes[0] != c || call.g.sizes[1] != d) {
    value_error(op, "G", join("have shape [classes, features] ([", c, ", ", d, "])"), call.g.shape());
  }
  const int64_t sizes[2] = {c, d}, strides[2] = {d, 1};
  Tensor out = empty_strided(call.x, sizes, strides, 2, call.x.dtype);
  if (c * d == 0) return out;
  if (n == 0) {
    fill(out, 0.0);  // the mean of nothing, as a gradient of no samples is 0
    return out;
  }
  x = with_rows(x, call.x), p = with_rows(p, call.p), g = with_rows(g, call.g);
  call.out = view_of(out, call.x.dtype);
  softmax_head_hvp(call);
  return out;
}

}  // namespace
}  // namespace marquardt

STABLE_TORCH_LIBRARY_FRAGMENT(marquardt, m) {
  m.def("gram_pair(Tensor g, Tensor x) -> (Tensor, Tensor)");
  m.def("softmax_head_hvp(Tensor x, Tensor p, Tensor G) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(marquardt, CPU, m) {
  m.impl("gram_pair", TORCH_BOX(&marquardt::gram_pair));
  m.impl("softmax_head_hvp", TORCH_BOX(&marquardt::head_hvp));
}
