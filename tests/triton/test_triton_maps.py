"""The scalar maps against forward duals in 60 decimal digits: relative error of every column."""

import decimal
import itertools

import pytest
import torch

Decimal = decimal.Decimal
decimal.getcontext().prec = 60

KEEP_NORM, PLAIN, EXTRAPOLATE = 0, 1, 2


class Dual:
    """Value and derivatives to the inputs, in Decimal."""

    def __init__(self, v, d):
        self.v, self.d = v, d

    @staticmethod
    def inputs(values):
        count = len(values)
        return [Dual(Decimal(v), [Decimal(int(i == j)) for j in range(count)]) for i, v in enumerate(values)]

    def lift(self, other):
        return other if isinstance(other, Dual) else Dual(Decimal(other), [Decimal(0)] * len(self.d))

    def __add__(self, other):
        o = self.lift(other)
        return Dual(self.v + o.v, [a + b for a, b in zip(self.d, o.d)])

    def __mul__(self, other):
        o = self.lift(other)
        return Dual(self.v * o.v, [a * o.v + self.v * b for a, b in zip(self.d, o.d)])

    def __neg__(self):
        return self * -1

    def __sub__(self, other):
        return self + -self.lift(other)

    def __truediv__(self, other):
        o = self.lift(other)
        return Dual(self.v / o.v, [(a * o.v - self.v * b) / (o.v * o.v) for a, b in zip(self.d, o.d)])

    def sqrt(self):
        root = self.v.sqrt()
        return Dual(root, [a / (2 * root) for a in self.d])

    __radd__, __rmul__ = __add__, __mul__


def coefficients(mode, n, e, R, a, b):
    """(c0, c1) as the definition has them: no special cases, no rearrangement."""
    G = n * R - e * e
    if mode == EXTRAPOLATE:
        scale = (a * a * G / (n * n) + 1).sqrt()
        return (a * e / n + 1) / scale, -a / scale
    Et, m = n + b * e, n + b * e * 2 + b * b * R
    A, B = a + b * (b * R + e), b * Et
    if mode == PLAIN:
        return A / (a + m), -B / (a + m)
    s = (n / (a * a * n + b * b * G * (a * 2 + m))).sqrt()
    return s * A, -(s * B)


def oracle(op, mode, gram, coef):
    """One row of frame_map, and the sum of the magnitudes that each column adds up."""
    m = 1 if mode == EXTRAPOLATE else 2
    second = coef[1] if m == 2 else 0.0
    n, e, R, a, b = Dual.inputs([*gram[:3], coef[0], second])
    c0, c1 = coefficients(mode, n, e, R, a, b)
    if op == 1:
        return [c0.v, c1.v], [abs(c0.v), abs(c1.v)]
    if op == 2:
        x, y = Decimal(gram[3]), Decimal(gram[4])
        terms = [(p * x, q * y) for p, q in zip(c0.d, c1.d)]
        F = [p + q for p, q in terms]
        size = [abs(p) + abs(q) for p, q in terms]
        values = [2 * F[0] - F[1], F[1] - 2 * F[2], c0.v - c1.v, F[1], 2 * F[2], c1.v, *F[3 : 3 + m]]
        sizes = [
            2 * size[0] + size[1],
            size[1] + 2 * size[2],
            abs(c0.v) + abs(c1.v),
            size[1],
            2 * size[2],
            abs(c1.v),
        ]
        return values, [*sizes, *size[3 : 3 + m]]
    t = [Decimal(v) for v in (*gram[3:6], *coef[m:])]
    moved = [[d * s for d, s in zip(c.d, t)] for c in (c0, c1)]
    return [sum(moved[0]), sum(moved[1]), c0.v, c1.v], [
        *(sum(map(abs, v)) for v in moved),
        abs(c0.v),
        abs(c1.v),
    ]


def worst(kernels, op, mode, grams, coefs):
    """Largest error of a column, relative to the magnitudes it adds up."""
    found = kernels.frame.frame_map(
        op, mode, torch.tensor(grams, dtype=torch.float64), torch.tensor(coefs, dtype=torch.float64)
    )
    largest = 0.0
    for row, gram, coef in zip(found.tolist(), grams, coefs):
        values, sizes = oracle(op, mode, gram, coef)
        assert len(values) == len(row)
        for column, (f, v, s) in enumerate(zip(row, values, sizes)):
            if s != 0:
                error = float(abs(Decimal(f) - v) / s)
                assert error == error and error < 1, (column, gram, coef, f, float(v))
                largest = max(largest, error)
            else:
                assert f == 0, (column, gram, coef, f)
    return largest


def cases(op, mode, seed, scales, correlations, dampings, kappas):
    """Grams of vectors with the given correlation, inner products with g, tangents; exactly representable."""
    gen = torch.Generator().manual_seed(seed)
    grams, coefs = [], []
    for scale, rho, damping, kappa in itertools.product(scales, correlations, dampings, kappas):
        eps, g, eps_t, prev_t, other = torch.randn(5, 8, generator=gen, dtype=torch.float64)
        prev = rho * eps + (1 - rho * rho) ** 0.5 * other
        r = prev - eps
        n, e, R = scale * eps.dot(eps), scale * eps.dot(r), scale * r.dot(r)
        extra = {1: [], 2: [g.dot(eps) * scale, g.dot(r) * scale]}.get(
            op,
            [2 * eps.dot(eps_t) * scale, (eps.dot(prev_t) + r.dot(eps_t)) * scale, 2 * r.dot(prev_t) * scale],
        )
        grams.append([float(v) for v in (n, e, R, *extra)])
        row = [kappa] if mode == EXTRAPOLATE else [damping * float(n), kappa]
        if op == 3:
            row += [v * 0.7 for v in row] if mode == EXTRAPOLATE else [0.3 * float(n), 0.4]
        coefs.append(row)
    return grams, coefs


@pytest.mark.parametrize("op", [1, 2, pytest.param(3, marks=pytest.mark.full)])
@pytest.mark.parametrize("mode", [KEEP_NORM, PLAIN, EXTRAPOLATE])
def test_random_and_extreme(kernels, op, mode):
    grams, coefs = cases(
        op, mode, 1, [1.0, 1e-30, 1e30], [0.0, 0.7, -0.9], [1e-6, 1.0, 1e8], [1e-9, 0.3, 0.9, 1.0, -2.0]
    )
    assert worst(kernels, op, mode, grams, coefs) <= 1e-13


@pytest.mark.parametrize("op", [1, 2, 3])
@pytest.mark.parametrize("mode", [KEEP_NORM, PLAIN, EXTRAPOLATE])
def test_nearly_equal_vectors(kernels, op, mode):
    """Correlation → 1, the case the residual basis is for (G/(nR) stays of order one)."""
    grams, coefs = cases(op, mode, 2, [1.0], [0.999999, 1 - 1e-12], [1e-4, 1.0], [0.01, 0.5])
    assert worst(kernels, op, mode, grams, coefs) <= 1e-13


@pytest.mark.parametrize("mode", [KEEP_NORM, PLAIN, EXTRAPOLATE])
def test_kappa_zero_is_the_identity_and_reads_nothing(kernels, mode):
    nan, inf = float("nan"), float("inf")
    coef = [0.0] if mode == EXTRAPOLATE else [0.5, 0.0]
    f = lambda op, gram, c=coef: kernels.frame.frame_map(  # noqa: E731
        op, mode, torch.tensor([gram], dtype=torch.float64), torch.tensor([c], dtype=torch.float64)
    )[0].tolist()
    one = 0.5 / (0.5 + 2.0) if mode == PLAIN else 1.0
    assert f(1, [2.0, nan, inf]) == [one, 0.0]
    back = f(2, [2.0, nan, inf, 3.0, nan])
    slope = -2 * 0.5 * 3.0 / 2.5**2 if mode == PLAIN else 0.0
    assert back[0] == pytest.approx(slope, rel=1e-15) and back[1] == 0.0 and back[2] == one
    assert back[3:6] == [0.0, 0.0, 0.0]
    if mode != EXTRAPOLATE:
        assert back[6] == pytest.approx(2.0 * 3.0 / 2.5**2 if mode == PLAIN else 0.0, rel=1e-15)
    still = coef + [0.0] * len(coef)
    moved = f(3, [2.0, 0.0, 0.0, 1.0, 0.0, 0.0], still)
    assert moved[2:] == [one, 0.0] and moved[1] == 0.0
    # the derivative to κ itself is the limit
    at_zero = f(2, [2.0, 0.5, 3.0, 0.7, -0.4])[-1]
    expected = {
        KEEP_NORM: (0.5 * 0.7 - 2.0 * -0.4) / 0.5,
        PLAIN: (0.5 * (2.0 - 0.5) / 2.5 * 0.7 - 2.0 * -0.4) / 2.5,
        EXTRAPOLATE: 0.5 / 2.0 * 0.7 + 0.4,
    }[mode]
    assert at_zero == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("mode", [KEEP_NORM, PLAIN, EXTRAPOLATE])
def test_zero_eps(kernels, mode):
    coef = torch.tensor([[0.7] if mode == EXTRAPOLATE else [0.5, 0.3]], dtype=torch.float64)
    f = lambda op, gram, c: kernels.frame.frame_map(op, mode, torch.tensor([gram], dtype=torch.float64), c)  # noqa: E731
    assert f(1, [0.0, 0.0, 2.0], coef).tolist() == [[0.0, 0.0]]
    assert not f(2, [0.0, 0.0, 2.0, 0.0, 1.5], coef).any()
    assert not f(3, [0.0, 0.0, 2.0, 0.0, 0.3, 0.4], torch.cat([coef, coef], 1)).any()


def test_no_damping_and_parallel(kernels):
    """⟨d,d⟩ = 0: the identity with the identity's gradient, also where multiply and subtract would be fused."""
    for n in (1.0, 0.1, 3.0e5 / 7):
        coef = torch.tensor([[0.0, 0.3]], dtype=torch.float64)
        gram = torch.tensor([[n, n, n]], dtype=torch.float64)
        assert kernels.frame.frame_map(1, KEEP_NORM, gram, coef).tolist() == [[1.0, 0.0]]
        full = torch.tensor([[n, n, n, 0.3, 0.4]], dtype=torch.float64)
        assert kernels.frame.frame_map(2, KEEP_NORM, full, coef).tolist() == [
            [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
        ]


@pytest.mark.parametrize("damping", [-1.0, -1e-300, float("nan")])
def test_bad_damping(kernels, damping):
    """It spoils its sample, as in C++."""
    gram = torch.tensor([[2.0, 0.3, 1.0]], dtype=torch.float64)
    for mode in (KEEP_NORM, PLAIN):
        coef = torch.tensor([[damping, 0.2]], dtype=torch.float64)
        assert kernels.frame.frame_map(1, mode, gram, coef).isnan().all()
    coef = torch.tensor([[damping, 0.0]], dtype=torch.float64)
    assert kernels.frame.frame_map(1, KEEP_NORM, gram, coef).tolist() == [[1.0, 0.0]]


def test_scalars_reach_the_kernel_as_float64(kernels):
    """1 + 2⁻⁴⁰ is not a float32."""
    for value in (1 + 2.0**-40, -0.1, 0.0, 1e-310, 3e300, float("inf")):
        x = torch.ones(1, 5, dtype=torch.float64)
        coef = torch.tensor([value], dtype=torch.float64)
        assert kernels.frame.affine_step([x], coef, None, 1).tolist() == [[value] * 5]
