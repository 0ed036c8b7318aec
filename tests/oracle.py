"""What the ops should give, in numpy longdouble, written from the formulas alone.

Nothing here comes from the package under test. A sample is a row: tensors are [B, D], scalars [B]. Coefficients of
an op are written once, as a function of a few scalars; derivatives come from dual numbers, so a map and its
gradient cannot disagree. `published_*` are the formulas as they appear in print: longdouble carries them far
enough (relative error 1e-19·n/λ) to judge the closed forms over the whole range of the parameters.
"""

from __future__ import annotations

import functools

import numpy as np

LD = np.longdouble
KEEP_NORM, PLAIN, EXTRAPOLATE = 0, 1, 2


def wide(x) -> np.ndarray:
    return np.asarray(x, dtype=LD)


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """⟨a, b⟩ of each row, [B]."""
    return (a * b).sum(-1)


class Dual:
    """A number per sample, v [B], with its derivatives to k variables, d [k, B]."""

    __array_ufunc__ = None  # numpy arrays leave the arithmetic to this class

    def __init__(self, v, d):
        self.v, self.d = wide(v), wide(d)

    @staticmethod
    def variables(*values) -> list[Dual]:
        count = len(values)
        unit = np.eye(count, dtype=LD)
        return [Dual(v, np.repeat(unit[i][:, None], len(wide(v)), axis=1)) for i, v in enumerate(values)]

    def _other(self, o) -> Dual:
        return (
            o if isinstance(o, Dual) else Dual(np.broadcast_to(wide(o), self.v.shape), np.zeros_like(self.d))
        )

    def __add__(self, o):
        o = self._other(o)
        return Dual(self.v + o.v, self.d + o.d)

    def __mul__(self, o):
        o = self._other(o)
        return Dual(self.v * o.v, self.d * o.v + o.d * self.v)

    def __truediv__(self, o):
        o = self._other(o)
        return Dual(self.v / o.v, (self.d - o.d * (self.v / o.v)) / o.v)

    def __neg__(self):
        return Dual(-self.v, -self.d)

    def __sub__(self, o):
        return self + (-self._other(o))

    def __rtruediv__(self, o):
        return self._other(o) / self

    def __rsub__(self, o):
        return self._other(o) - self

    __radd__, __rmul__ = __add__, __mul__

    def sqrt(self):
        root = np.sqrt(self.v)
        return Dual(root, self.d / (2 * root))


def sqrt(x):
    return x.sqrt() if isinstance(x, Dual) else np.sqrt(x)


# ---------------------------------------------------------------------------------------------- lm_direction
def lm_map(mode: int, n, e, R, *coef):
    """(c0, c1) of `c0·ε + c1·r` where no special case applies; n = ⟨ε,ε⟩, e = ⟨ε,r⟩, R = ⟨r,r⟩, r = p − ε."""
    G = n * R - e * e
    if mode == EXTRAPOLATE:
        (gamma,) = coef
        scale = 1.0 / sqrt(1.0 + gamma * gamma * G / (n * n))
        return (1.0 + gamma * e / n) * scale, -gamma * scale
    damping, kappa = coef
    Et = n + kappa * e
    m = n + 2.0 * kappa * e + kappa * kappa * R
    a, b = damping + kappa * (kappa * R + e), kappa * Et
    if mode == PLAIN:
        return a / (damping + m), -b / (damping + m)
    scale = sqrt(n / (damping * damping * n + kappa * kappa * G * (2.0 * damping + m)))
    return a * scale, -b * scale


def lm_special(mode: int, n, e, R, *coef) -> tuple[np.ndarray, np.ndarray]:
    """Masks [B]: samples whose output is exactly eps, and samples whose output is exactly 0."""
    empty = n == 0
    if mode == EXTRAPOLATE:
        return (coef[0] == 0) & ~empty, empty
    damping, kappa = coef
    G = np.maximum(n * R - e * e, 0)
    m = n + 2 * kappa * e + kappa * kappa * R
    if mode == PLAIN:
        return np.zeros_like(empty), empty | (damping + m == 0)
    dd = damping * damping * n + kappa * kappa * G * (2 * damping + m)
    return ((kappa == 0) | (dd == 0)) & ~empty, empty


def _lm_parts(eps, prev, coef):
    eps = wide(eps)
    prev = eps if prev is None else wide(prev)
    r = prev - eps
    coef = [np.broadcast_to(wide(c), eps.shape[:1]) for c in coef]
    return eps, r, coef, (dot(eps, eps), dot(eps, r), dot(r, r))


def lm_direction(eps, prev, mode: int, *coef) -> np.ndarray:
    """The LM direction of each row, by the closed form."""
    eps, r, coef, gram = _lm_parts(eps, prev, coef)
    r = np.where((coef[-1] == 0)[:, None], 0, r)  # κ = 0: prev may hold anything
    same, zero = lm_special(mode, *gram, *coef)
    with np.errstate(all="ignore"):
        c0, c1 = lm_map(mode, *gram, *coef)
    c0, c1 = np.where(zero, 0, np.where(same, 1, c0)), np.where(zero | same, 0, c1)
    return c0[:, None] * eps + c1[:, None] * r


def lm_rounding(eps, prev, mode: int, coef, unit: float) -> np.ndarray:
    """[B, D]: how much the direction moves when each scalar product is off by `unit` of its Cauchy–Schwarz bound."""
    eps, r, coef, gram = _lm_parts(eps, prev, coef)
    scale = gram[0], np.sqrt(gram[0] * gram[2]), gram[2]
    with np.errstate(all="ignore"):
        c0, c1 = lm_map(mode, *Dual.variables(*gram, *coef))
    moves = [
        np.abs(a[:, None] * eps + b[:, None] * r) * s[:, None]
        for a, b, s in zip(c0.d, c1.d, scale, strict=False)
    ]
    return np.nan_to_num(unit * sum(moves))


def lm_row(mode: int, gram, coef) -> np.ndarray:
    """[2]: (c0, c1) of one sample, special cases included, scalars in, scalars out."""
    gram, coef = [wide([x]) for x in gram], [wide([x]) for x in coef]
    same, zero = lm_special(mode, *gram, *coef)
    if zero[0]:
        return wide([0, 0])
    if same[0]:
        return wide([1, 0])
    return wide([c[0] for c in lm_map(mode, *gram, *coef)])


def lm_direction_vjp(eps, prev, mode: int, coef, grad):
    """(d_eps, d_prev, [d_coef]) and the size against which an error of each d_coef is to be judged.

    With F = c0⟨g,ε⟩ + c1⟨g,r⟩ as a function of (n, e, R, coef): r̄ = c1·g + F_e·ε + 2F_R·r is the gradient of prev,
    and eps receives c0·g + 2F_n·ε + F_e·r − r̄.
    """
    eps, r, coef, gram = _lm_parts(eps, prev, coef)
    g = wide(grad)
    ge, gr = dot(g, eps), dot(g, r)
    with np.errstate(all="ignore"):
        c0, c1 = lm_map(mode, *Dual.variables(*gram, *coef))
        Fn, Fe, FR, *Fc = c0.d * ge + c1.d * gr
    sizes = [
        np.abs(d0) * np.sqrt(gram[0]) + np.abs(d1) * np.sqrt(gram[2])
        for d0, d1 in zip(c0.d[3:], c1.d[3:], strict=True)
    ]
    same, zero = lm_special(mode, *gram, *coef)
    one, nil = same[:, None], zero[:, None]
    r_bar = c1.v[:, None] * g + Fe[:, None] * eps + 2 * FR[:, None] * r
    d_eps = c0.v[:, None] * g + 2 * Fn[:, None] * eps + Fe[:, None] * r - r_bar
    d_eps = np.where(nil, 0, np.where(one, g, d_eps))
    d_prev = np.where(nil | one, 0, r_bar)
    if prev is None:  # eps stands in for prev: nothing flows there
        d_prev = np.zeros_like(g)
    norm = np.sqrt(dot(g, g))
    return d_eps, d_prev, [np.where(zero, 0, f) for f in Fc], [s * norm for s in sizes]


def lm_direction_jvp(eps, prev, mode: int, coef, eps_t, prev_t, coef_t) -> np.ndarray:
    """Derivative of the direction along (eps_t, prev_t, coef_t), away from the special cases."""
    eps, r, coef, gram = _lm_parts(eps, prev, coef)
    eps_t = wide(eps_t)
    r_t = np.zeros_like(r) if prev is None else wide(prev_t) - eps_t
    gram_t = (2 * dot(eps, eps_t), dot(eps_t, r) + dot(eps, r_t), 2 * dot(r, r_t))
    coef_t = [np.broadcast_to(wide(c), eps.shape[:1]) for c in coef_t]
    c0, c1 = lm_map(mode, *Dual.variables(*gram, *coef))
    step = [sum(d * t for d, t in zip(c.d, [*gram_t, *coef_t], strict=True)) for c in (c0, c1)]
    rows = (c0.v, eps_t), (c1.v, r_t), (step[0], eps), (step[1], r)
    return sum(c[:, None] * v for c, v in rows)


def published_lm(eps, prev, damping, kappa, keep_norm=True) -> np.ndarray:
    """ε̃ = κp + (1−κ)ε;  u = ε − ε̃⟨ε,ε̃⟩/(λ+‖ε̃‖²);  out = u·‖ε‖/‖u‖: Sherman–Morrison as it is printed."""
    eps, prev = wide(eps), wide(prev)
    damping, kappa = (np.broadcast_to(wide(c), eps.shape[:1])[:, None] for c in (damping, kappa))
    mix = kappa * prev + (1 - kappa) * eps
    u = eps - mix * dot(eps, mix)[:, None] / (damping + dot(mix, mix)[:, None])
    return u * np.sqrt(dot(eps, eps) / dot(u, u))[:, None] if keep_norm else u


def published_extrapolation(eps, prev, gamma) -> np.ndarray:
    """d = (1 − γ⟨ε,ε−p⟩/n)ε + γ(ε − p);  out = d·‖ε‖/‖d‖."""
    eps, prev = wide(eps), wide(prev)
    gamma = np.broadcast_to(wide(gamma), eps.shape[:1])[:, None]
    n = dot(eps, eps)[:, None]
    d = (1 - gamma * dot(eps, eps - prev)[:, None] / n) * eps + gamma * (eps - prev)
    return d * np.sqrt(n / dot(d, d)[:, None])


# ----------------------------------------------------------------------------------------------- affine_step
def affine_step(terms, coef, noise=None) -> np.ndarray:
    """Σ_j c_j·term_j (+ c_last·noise) of each row."""
    vectors = [*terms, noise] if noise is not None else list(terms)
    batch = wide(terms[0]).shape[:1]
    coef = [np.broadcast_to(wide(c), batch)[:, None] for c in coef]
    return sum(c * wide(v) for c, v in zip(coef, vectors, strict=True))


# ------------------------------------------------------------------------------------------ the frame engine
def frame_rows(streams, prologue=None, clamp=None, ones=False, noise=None) -> np.ndarray:
    """[B, k, D]: rows L·v behind their clamp; v = streams, ones, noise."""
    vectors = [wide(s) for s in streams]
    if ones:
        vectors.append(np.ones_like(vectors[0]))
    if noise is not None:
        vectors.append(wide(noise))
    rows = np.stack(vectors, axis=1)
    if prologue is not None:
        L = np.broadcast_to(wide(prologue), (rows.shape[0], *np.shape(prologue)[-2:]))
        rows = np.stack([(L[:, i, :, None] * rows).sum(1) for i in range(L.shape[1])], axis=1)
    if clamp is not None:
        clamp = wide(clamp)
        rows = np.minimum(np.maximum(rows, clamp[:, 0, None]), clamp[:, 1, None])
    return rows


def frame_gram(rows: np.ndarray) -> np.ndarray:
    """[B, k, k]."""
    k = rows.shape[1]
    return np.stack([np.stack([dot(rows[:, i], rows[:, j]) for j in range(k)], -1) for i in range(k)], -2)


def frame_apply(rows: np.ndarray, C) -> list[np.ndarray]:
    """C·rows, one [B, D] per row of C."""
    C = np.broadcast_to(wide(C), (rows.shape[0], *np.shape(C)[-2:]))
    return [(C[:, i, :, None] * rows).sum(1) for i in range(C.shape[1])]


# ----------------------------------------------------------------------------------------------------- noise
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counter: np.ndarray, key) -> np.ndarray:
    """Ten rounds of Philox4x32; counter [..., 4] and key (2) hold 32-bit words."""
    c = [np.asarray(counter[..., i], dtype=np.uint64) for i in range(4)]
    k = [np.uint64(int(w)) for w in key]
    for _ in range(10):
        p, q = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(q >> _SHIFT) ^ c[1] ^ k[0], q & _MASK, (p >> _SHIFT) ^ c[3] ^ k[1], p & _MASK]
        k = [(k[0] + np.uint64(0x9E3779B9)) & _MASK, (k[1] + np.uint64(0xBB67AE85)) & _MASK]
    return np.stack(c, axis=-1).astype(np.uint32)


def noise_words(seed, index) -> np.ndarray:
    """[..., 4]: the words from which the elements `index` are made; seed = two int64 values."""
    key, stream = (int(s) % 2**64 for s in seed)
    block = np.asarray(index, dtype=np.uint64) // np.uint64(4)
    high = np.full_like(block, stream & 0xFFFFFFFF), np.full_like(block, stream >> 32)
    counter = np.stack([block & _MASK, block >> _SHIFT, *high], axis=-1)
    return philox4x32(counter, (key & 0xFFFFFFFF, key >> 32))


def _cos_sin_turns(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos 2πv and sin 2πv with the quadrant taken off exactly, so that the zeros are zeros."""
    t = 4 * v.astype(np.float64)
    quarter = np.rint(t)
    angle = (t - quarter) * (np.pi / 2)
    c, s = np.cos(angle), np.sin(angle)
    turn = quarter.astype(np.int64) % 4
    return np.choose(turn, [c, -s, -c, s]), np.choose(turn, [s, c, -s, -c])


def _four_normals(words: np.ndarray) -> np.ndarray:
    """[..., 4] words to [..., 4] normals: u and v as float32 gives them, Box–Muller in float64."""
    words = words.astype(np.float32).astype(np.float64)
    u = (words[..., 0::2] * 2.0**-32 + 2.0**-33).astype(np.float32).astype(np.float64)
    v = words[..., 1::2] * 2.0**-32
    radius = np.sqrt(-2 * np.log(u))
    cos, sin = _cos_sin_turns(v)
    return np.stack([radius * cos, radius * sin], axis=-1).reshape(words.shape)


def noise_like(shape, seed, batch_dims: int = 1) -> np.ndarray:
    """Noise of a call on a tensor of `shape`: seed [2] counts through the call, [B, 2] within each sample."""
    seed = np.asarray(seed, dtype=np.int64)
    if seed.ndim == 1:
        return _stream(tuple(map(int, seed)), int(np.prod(shape, dtype=np.int64))).reshape(shape)
    size = int(np.prod(shape[batch_dims:], dtype=np.int64))
    return np.stack([_stream(tuple(map(int, s)), size) for s in seed]).reshape(shape)


@functools.lru_cache(maxsize=64)
def _stream(seed: tuple[int, int], count: int) -> np.ndarray:
    """The first `count` normals; a block of four words makes four of them."""
    return _four_normals(noise_words(seed, 4 * np.arange((count + 3) // 4))).reshape(-1)[:count]
