"""Dynamic thresholding: predictions are clamped to a quantile of their own size, and rescaled."""

from __future__ import annotations

from typing import Any

import torch

from . import checks, checks_threshold, declare, scalars
from .declare import Op
from .layout import batch_and_size, empty_output
from .reference import threshold as reference
from .scalars import Scalar

Tensor = torch.Tensor

OP = checks_threshold.OP


class _Apply(Op):
    """Errors about `out` name the public function."""

    def _check_out(self, out: Tensor, *args: Any) -> None:
        self.check(*args)
        checks.out(OP, out, "x0", args[0], args[:1])


SCALE = Op(
    "threshold_scale(Tensor x, Tensor coef, int batch_dims) -> Tensor",
    reference=reference.threshold_scale,
    fake=lambda x, coef, batch_dims: x.new_empty((batch_and_size(x, batch_dims)[0], 1), dtype=torch.float64),
    check=checks_threshold.threshold_scale,
    returns_scalars=True,
    public=(OP,),
)
APPLY = _Apply(
    "threshold_apply(Tensor x, Tensor coef, int batch_dims) -> Tensor",
    reference=reference.threshold_apply,
    fake=lambda x, coef, batch_dims: empty_output(x),
    check=checks_threshold.threshold_apply,
    out=True,
)


def threshold_scale(x0: Tensor, ratio: Scalar, maximum: Scalar, batch_dims: int) -> Tensor:
    """s = clamp(quantile(|x0|, ratio), 1, maximum) per sample, [B, 1] float64: what a step takes for its bounds."""
    if type(ratio) is float and type(maximum) is float:
        coef = scalars.of_floats((ratio, maximum))
    else:
        checks.floating(OP, "x0", x0)
        checks.batched(OP, "x0", x0, batch_dims)
        coef = scalars.pack(OP, reference.NAMES, (ratio, maximum), x0, batch_dims)
    scale: Tensor = SCALE.call(x0, coef, batch_dims)
    return scale


def dynamic_threshold(
    x0: Tensor,
    *,
    ratio: Scalar = 0.995,
    maximum: Scalar = 1.0,
    batch_dims: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    r"""Clamp each sample to a quantile of its magnitudes, and rescale it to [−1, 1].

        s = clamp(quantile(|x0| of the sample, ratio), 1, maximum),   out = clamp(x0/s, −1, 1) = clamp(x0, −s, s)/s

    The quantile is exact and that of `torch.quantile` (linear between two neighbours, at position ratio·(D − 1), in
    float64 here), of samples of any size. On the CPU it is selected in little more than one pass over x0. With
    `maximum=1` s is 1, and the result x0 clamped to ±1.

    NaN in a sample makes that sample NaN; infinite elements count as larger than all others. A sample without elements
    has s = 1.

    Args:
        x0: [B, *sample] (or [*sample] with `batch_dims=0`), a predicted sample.
        ratio: between 0 and 1: number, 0-dim tensor or [B].
        maximum: of s, at least 1: number, 0-dim tensor or [B].
        out: where to write; may be `x0` itself.

    Returns:
        Tensor like `x0`. Differentiable in x0 (also through the two magnitudes that make s), ratio and maximum.

    Paper: "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding" (Imagen).

    >>> import torch, marquardt as mq
    >>> mq.dynamic_threshold(torch.tensor([[-4.0, 1.0, 2.0]]), ratio=0.5, maximum=3.0)
    tensor([[-1.0000,  0.5000,  1.0000]])
    """
    if out is not None:
        _refuse_gradients(x0, ratio, maximum, out)
    scale = threshold_scale(x0, ratio, maximum, batch_dims)
    if out is None:
        return APPLY.call(x0, scale, batch_dims)
    return APPLY.to_out(out, x0, scale, batch_dims)


def _refuse_gradients(*arguments: Any) -> None:
    """As every op with `out=` does, before the selection is made."""
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        raise RuntimeError(declare._NO_GRADIENT.format(OP))
