"""Langevin sampling of a Gaussian of condition number 1000: plain, and with a Hessian learnt from the chain's steps.

    x' = x + h H⁻¹ g(x) + √(2h) H^(−½) ξ,    g = ∇ log density = −P x,    ξ = (ξₙ + ξₙ₊₁)/2

Plain Langevin is H = I: the stiffest direction bounds h, and the softest waits for it. The second sampler learns
H = λI + U diag(s) Uᵀ, one per chain, while it warms up. A step δ changes the score by −P δ; what H does not yet explain
of that, r = P δ − H δ, is folded in as H ← H + r rᵀ/⟨r, δ⟩, without another evaluation of the score. If no curvature is
below λ (the precision of a prior, say), H never exceeds P. Then H is frozen, because only a fixed H leaves the density
alone. Both take half of the largest stable step, 2/λmax(H⁻¹P). ξ is a mean over two steps because that makes the
covariance of a Gaussian exact for any stable h (Leimkuhler and Matthews, 2013).

    python examples/second_order_langevin.py    # half a minute: a table and, with matplotlib, the picture
"""

import time
from pathlib import Path

import torch

import marquardt as mq


def run(score, x, H, h, steps, learn=False):
    """The states [steps, B, D] of B chains that start at x [B, D], with steps h [B]."""
    path = x.new_empty(steps, *x.shape)
    g, xi = score(x), torch.randn_like(x)
    for new in path:
        x_old, g_old, xi_old, xi = x, g, xi, torch.randn_like(x)
        x = mq.affine_step([x, H.solve(g), H.inv_sqrt(xi_old + xi)], [1.0, h, (h / 2).sqrt()], out=new)
        g = score(x)
        if learn:
            delta = x - x_old
            r = g_old - g - H.matvec(delta)
            gained = (r * delta).sum(1, keepdim=True)
            useful = gained > 1e-6 * r.norm(dim=1, keepdim=True) * delta.norm(dim=1, keepdim=True)
            H.update(torch.where(useful, r / gained.abs().sqrt(), 0.0))
    return path


def half_of_stable(score, x, H, rounds=30):
    """1/λmax(H⁻¹P) per chain, [B], by power iteration on differences of the score."""
    v = torch.randn_like(x)
    for _ in range(rounds):
        v = v / v.norm(dim=1, keepdim=True)
        Pv = score(x) - score(x + v)
        h = (v * H.matvec(v)).sum(1) / (v * Pv).sum(1)
        v = H.solve(Pv)
    return h


def sample(score, x, warmup, steps, *, learn, rank=8, damping=1.0):
    """Warm up, learn H or leave it at λI, freeze it, choose the step, sample: (states [steps, B, D], H, h [B])."""
    H = mq.LowRankHessian(rank, damping=damping, decay=1.0)
    x = run(score, x, H, half_of_stable(score, x, H), warmup, learn)[-1]
    h = half_of_stable(score, x, H)
    return run(score, x, H, h, steps), H, h


# --- the target, and what the samples are worth ---------------------------------------------------------------


def gaussian(curvatures):
    """The precision P, its score, and the map from states to principal axes, each scaled to variance 1."""
    Q = torch.linalg.qr(torch.randn(len(curvatures), len(curvatures)))[0]
    P = (Q * curvatures) @ Q.T
    return P, lambda x: x @ -P, lambda x: x @ (Q * curvatures.sqrt())


def autocorrelation(z):
    """ρ [T, D] of z [T, B, D], pooled over chains, 0 from the first lag beyond 2.5 τ(lag) on (Sokal's window)."""
    T, found = len(z), []
    for y in (z - z.mean((0, 1))).unbind(2):
        power = torch.fft.rfft(y, n=2 * T, dim=0).abs().square().mean(1)
        found.append(torch.fft.irfft(power)[:T] / torch.arange(T, 0, -1))
    rho = torch.stack([f / f[0] for f in found], 1)
    tau = 2 * rho.cumsum(0) - 1
    return rho * (torch.arange(T)[:, None] < 2.5 * tau).int().cumprod(0)


def ess_per_step(rho):
    """1/τ [D]: effective samples per step and chain."""
    return 1 / (2 * rho.sum(0) - 1)


def covariance_scores(z, rho):
    """[D, D]: (covariance − I) over its Monte-Carlo error, from the effective samples of each zᵢ zⱼ (Bartlett)."""
    flat, eye = z.flatten(0, 1), torch.eye(z.shape[2])
    error = ((1 + eye) * (2 * rho.T @ rho - 1) / len(flat)).sqrt()
    return (flat.T @ flat / len(flat) - eye) / error


def draw(curvatures, kept, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, (rho, ess)), color, marker in zip(kept.items(), ("#D55E00", "#0072B2"), "os"):
        slowest = rho[:, ess.argmin()]
        left.semilogx(range(1, 3000), slowest[1:3000], color=color, lw=2)
        lag = int((slowest < 0.55).int().argmax())
        left.text(1.35 * lag, 0.55, name, color=color)
        right.loglog(curvatures, ess, marker, color=color, ms=4)
        right.text(2.8, ess.median(), name, color=color, va="center")
    low, high = (ess.min().item() for _, ess in kept.values())
    right.annotate("", (0.8, high), (0.8, low), arrowprops={"arrowstyle": "<->", "color": "0.35"})
    right.text(0.87, (low * high) ** 0.5, f"× {round(high / low, -1):.0f}", color="0.35", va="center")
    left.set(xlabel="lag in steps", ylabel="autocorrelation", title="Slowest principal direction")
    right.set(xlabel="curvature of the direction", ylabel="effective samples per step", ylim=(2e-4, 1))
    right.set_title("Every principal direction")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.minorticks_off()
    figure.savefig(file, dpi=150)


def main():
    torch.manual_seed(0)
    curvatures = torch.cat([torch.linspace(1, 2, 26), torch.logspace(2, 3, 6)])
    _, score, axes = gaussian(curvatures)
    print("                      effective samples per 1000 steps     covariance off by        µs per step")
    print("            step h    slowest   median   theory: 500 h   (Monte-Carlo errors, rms)   of 64 chains")
    kept = {}
    for name, steps in (("plain", 20_000), ("low-rank H", 3_000)):
        start = time.perf_counter()
        states, _, h = sample(score, torch.randn(64, 32), 2000, steps, learn=name != "plain")
        cost = 1e6 * (time.perf_counter() - start) / (2000 + steps)
        states = axes(states)
        rho = autocorrelation(states)
        ess, off = ess_per_step(rho), covariance_scores(states, rho).square().mean().sqrt()
        kept[name] = rho, ess
        numbers = h.mean(), 1e3 * ess.min(), 1e3 * ess.median(), 500 * h.mean(), off, cost
        print("{:10} {:8.4f} {:9.2f} {:9.2f} {:12.2f} {:18.2f} {:20.0f}".format(name, *numbers))
    try:
        draw(curvatures, kept, Path(__file__).with_suffix(".png"))
    except ImportError:
        print("no picture: pip install matplotlib")


if __name__ == "__main__":
    main()
