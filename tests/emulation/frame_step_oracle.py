"""What a step of a sampler must give, in longdouble from its definition, and how far rounding may take it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from frame_calls import Frame
from frame_cases import EXTRAPOLATE, SNR

import oracle
from harness.compare import rows

LD = np.longdouble


@dataclass
class Vector:
    """Numbers [B, D], how far rounding may take them, and how far what stands in no float32 formula may: noise."""

    v: np.ndarray
    off: np.ndarray
    noise: np.ndarray


class Step:
    """A step by its definition:  y = clamp(Σ Y s, ±bound),  e = Σ D s,  a = Σ A s,  x' = a + w·LM(e; p)."""

    def __init__(self, frame: Frame, unit: LD, xi: np.ndarray | None, xi_off: np.ndarray | None) -> None:
        """`unit`: of rounding; `xi` and how far normals may be off."""
        self.frame, self.u = frame, unit
        sources = [self.vector(rows(t)) for t in frame.streams[: frame.sources]]
        p = self.vector(rows(frame.streams[-1])) if len(frame.streams) > frame.sources else None
        numbers = iter(oracle.wide(frame.parameter_rows().numpy()).T)

        def take(count: int) -> list[np.ndarray]:
            return [next(numbers) for _ in range(count)]

        if frame.guided:
            gap = sources[1].v - sources[2].v
            sources[1] = Vector(gap, self.u * np.abs(gap), np.zeros_like(gap))
        self.first, self.second, self.w = take(3)
        on_a, on_d, terms = take(frame.sources), take(frame.sources), list(sources)
        if xi is not None:
            drawn = self.vector(oracle.wide(xi), xi_off)
            if frame.mode == SNR:
                p = drawn
            else:
                terms.append(drawn)
                for on in (on_a, on_d):
                    on += take(1)
        self.y = None
        if frame.clipped:
            more_a, more_d, bound = take(3)
            self.y = self.clamp(self.sum(take(frame.sources), sources), bound)
            terms.append(self.y)
            on_a.append(more_a)
            on_d.append(more_d)
        assert next(numbers, None) is None
        gate = self.second if frame.mode != EXTRAPOLATE else self.first
        self.reads = np.full(frame.batch, p is not None)
        if frame.mode != SNR:
            self.reads &= (gate != 0) & (self.w != 0)
        self.e = self.sum(on_d, terms)
        self.a = self.sum([np.where(self.reads, a, a + self.w * d) for a, d in zip(on_a, on_d)], terms)
        self.x = self.a if p is None else self.bent(p)

    def vector(self, v: np.ndarray, noise=None) -> Vector:
        none = np.zeros_like(v)
        return Vector(v, none, none if noise is None else noise)

    def sum(self, numbers, vectors) -> Vector:
        """A number that is 0 leaves its vector out, whatever it holds."""
        made = Vector(*np.zeros((3, self.frame.batch, self.frame.size), LD))
        for c, x in zip(numbers, vectors, strict=True):
            c = c[:, None]
            size = np.where(c == 0, 0, np.abs(c) * (np.abs(x.v) + x.off + x.noise))
            made.v = made.v + np.where(c == 0, 0, c * x.v)
            made.off = made.off + np.where(c == 0, 0, np.abs(c) * x.off) + (len(vectors) + 2) * self.u * size
            made.noise = made.noise + np.where(c == 0, 0, np.abs(c) * x.noise)
        return made

    def clamp(self, x: Vector, bound: np.ndarray) -> Vector:
        bound = bound[:, None]
        return Vector(np.minimum(np.maximum(x.v, -bound), bound), x.off + self.u * bound, x.noise)

    def bent(self, p: Vector) -> Vector:
        """a + w·LM(e; p) where p counts, else a."""
        frame, e, reads = self.frame, self.e, self.reads[:, None]
        p = Vector(*(np.where(reads, t, 0) for t in (p.v, p.off, p.noise)))
        r = p
        if frame.mode != SNR:
            r = Vector(p.v - e.v, p.off + e.off + self.u * np.abs(p.v - e.v), p.noise + e.noise)
        gram = [oracle.dot(s, t) for s, t in ((e.v, e.v), (e.v, r.v), (r.v, r.v))]
        n, m, R = oracle.Dual.variables(*gram)
        if frame.mode == SNR:  # h = 2(r‖p‖/‖e‖)², and √(2hT)
            c0 = R / n * (2 * self.first * self.first)
            c1 = (c0 * (2 * self.second)).sqrt()
            same, zero = np.zeros_like(self.reads), gram[0] == 0
        else:
            coef = (self.first,) if frame.mode == EXTRAPOLATE else (self.first, self.second)
            c0, c1 = (c * self.w for c in oracle.lm_map(frame.mode, n, m, R, *coef))
            same, zero = oracle.lm_special(frame.mode, *gram, *coef)
        on_e = np.where(zero, 0, np.where(same, self.w, c0.v))[:, None]
        on_r = np.where(zero | same, 0, c1.v)[:, None]
        value = self.a.v + on_e * e.v + on_r * r.v

        def moved(kind: str, u: LD, sums: LD) -> np.ndarray:
            """By rows that are off, their scalar products with them, and what is rounded on the way."""
            a, off_e, off_r = (getattr(t, kind) for t in (self.a, e, r))
            s, t = np.abs(e.v), np.abs(r.v)
            off = (
                2 * oracle.dot(s, off_e) + sums * gram[0],
                oracle.dot(s, off_r) + oracle.dot(t, off_e) + sums * oracle.dot(s, t),
                2 * oracle.dot(t, off_r) + sums * gram[2],
            )
            d0, d1 = (sum(np.abs(d) * o for d, o in zip(c.d, off, strict=True)) for c in (c0, c1))
            scale = np.abs(self.a.v) + np.abs(on_e * e.v) + np.abs(on_r * r.v)
            move = a + np.abs(on_e) * off_e + np.abs(on_r) * off_r + 5 * u * scale
            return move + np.nan_to_num(d0[:, None] * s + d1[:, None] * t)

        sums = LD((frame.size + 2) * 2.0**-53)
        made = Vector(value, moved("off", self.u, sums), moved("noise", LD(0), sums))
        return Vector(*(np.where(reads, getattr(made, k), getattr(self.a, k)) for k in ("v", "off", "noise")))
