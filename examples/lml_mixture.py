"""Does the LML direction help a sampler of few steps? Asked of a mixture of Gaussians, whose score is known.

The model is ε(x, t) = −σ ∇log p_t(x) of the mixture itself, so all error is that of the sampler. Every sampler starts
from the same noise; where it arrives is compared with where plain DDIM arrives in 999 steps (the probability flow):
root mean square distance over the samples, relative to their norm.

    DDIM        x' = √ᾱ' x₀(ε) + √(1 − ᾱ') ε
    LML-DDIM    x' = √ᾱ' x₀(ε) + √(1 − ᾱ') LM(ε)            bends a part of what ε does to the step
    LML-DPM     x' = (α'/α) x + LM(N),  N = −σ'(e^h − 1) ε   bends all of it

LM is ‖ε‖ d/‖d‖ with d = ε + γ(ε − prev) less its part along ε: an extrapolation of the direction at constant norm. In
LML-DPM a γ of ½ to 1 beats DDIM. In LML-DDIM every γ > 0, and so every κ > 0, makes it worse: ε counts in the step
with √(1 − ᾱ') − √ᾱ' √(1 − ᾱ)/√ᾱ, which is negative, and only the first, positive part is bent; a γ < 0 helps.

    python examples/lml_mixture.py    # a minute: a table and, with matplotlib, the picture
"""

import math
from pathlib import Path

import torch

import marquardt as mq


def schedule(count=1000):
    """ᾱ [count] of the scaled linear schedule, float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, count, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


class Mixture:
    """K Gaussians of one width around `means` [K, D], diffused: x_t = √ᾱ y + √(1 − ᾱ) ξ."""

    def __init__(self, means, width):
        self.means, self.width = means, width

    def eps(self, x, alpha_bar):
        """−σ ∇log p_t(x), [B, D]."""
        centres = math.sqrt(alpha_bar) * self.means
        variance = alpha_bar * self.width**2 + 1 - alpha_bar
        weights = torch.softmax(-(torch.cdist(x, centres) ** 2) / (2 * variance), 1)  # [B, K]
        return math.sqrt(1 - alpha_bar) * (x - weights @ centres) / variance


def ddim(mixture, x, alpha_bars, gamma=0.0):
    """x after a walk over `alpha_bars`, noisiest first, with LML on DDIM."""
    prev = None
    for now, then in zip(alpha_bars, alpha_bars[1:]):
        eps = mixture.eps(x, now)
        x, prev = mq.lml_ddim_step(x, eps, prev, alpha_bar=now, alpha_bar_next=then, extrapolation=gamma)
    return x


def dpm(mixture, x, alpha_bars, gamma=0.0, order=1):
    """The same with LML on DPM-Solver; order 1 at γ = 0 is DDIM."""
    alphas, sigmas = [math.sqrt(a) for a in alpha_bars], [math.sqrt(1 - a) for a in alpha_bars]
    lambdas = [math.log(a / s) for a, s in zip(alphas, sigmas)]
    prev, outputs = None, []
    for i in range(len(alpha_bars) - 1):
        outputs = [mixture.eps(x, alpha_bars[i]), *outputs[: order - 1]]
        used = len(outputs)
        at = slice(i + 1, i - used if i >= used else None, -1)  # target, s0, s1 …
        x, prev = mq.lml_dpm_step(
            x, outputs, prev, lambdas=lambdas[at], alphas=alphas[at], sigmas=sigmas[at], order=used,
            algorithm="dpmsolver", apply_to="direction", extrapolation=gamma,
        )  # fmt: skip
    return x


SAMPLERS = {
    "DDIM": lambda m, x, a: ddim(m, x, a),
    "LML-DDIM, γ = 0.3": lambda m, x, a: ddim(m, x, a, 0.3),
    "LML-DDIM, γ = −0.3": lambda m, x, a: ddim(m, x, a, -0.3),
    "LML-DPM, γ = 0.5": lambda m, x, a: dpm(m, x, a, 0.5),
    "LML-DPM, γ = 1": lambda m, x, a: dpm(m, x, a, 1.0),
    "DPM-Solver of order 2": lambda m, x, a: dpm(m, x, a, order=2),
}


def errors(mixture, noise, counts, samplers=SAMPLERS, fine=999):
    """{sampler: [error for each number of steps]}."""
    table = schedule()

    def walk(count):
        return table[torch.linspace(len(table) - 1, 0, count + 1).round().long()].tolist()

    exact = ddim(mixture, noise, walk(fine))
    scale = exact.square().sum(1).mean().sqrt()
    return {
        name: [
            float((sample(mixture, noise, walk(n)) - exact).square().sum(1).mean().sqrt() / scale)
            for n in counts
        ]
        for name, sample in samplers.items()
    }


def draw(counts, found, file):
    """Error over steps, one line a sampler."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    colors = ("0.25", "#D55E00", "#E69F00", "#56B4E9", "#0072B2", "0.6")
    for (name, values), color in zip(found.items(), colors):
        axes.plot(counts, values, "o-" if "LML" in name else "s--", color=color, label=name, ms=4)
    axes.set(
        xlabel="steps, each one evaluation of the model", ylabel="distance to the exact flow", yscale="log"
    )
    axes.set_xticks(counts, [str(n) for n in counts])
    ticks = (0.05, 0.1, 0.2)
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=150)


def main():
    """Eight Gaussians of width 0.3 in 64 dimensions."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(8, 64, generator=generator, dtype=torch.float64)
    noise = torch.randn(512, 64, generator=generator, dtype=torch.float64)
    counts = [5, 6, 8, 10, 15, 20]
    found = errors(Mixture(means, 0.3), noise, counts)
    print(f"{'steps':24}" + "".join(f"{n:8}" for n in counts))
    for name, values in found.items():
        print(f"{name:24}" + "".join(f"{v:8.4f}" for v in values))
    try:
        draw(counts, found, Path(__file__).with_suffix(".png"))
    except ImportError:
        print("no picture: pip install matplotlib")


if __name__ == "__main__":
    main()
