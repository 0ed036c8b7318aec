"""The scalar maps: from a sample's Gram entries and scalars to the coefficients of its rows, all in float64.

`lm_direction` in residual form, r = p − ε, n = ⟨ε,ε⟩, e = ⟨ε,r⟩, R = ⟨r,r⟩, out = c0·ε + c1·r:

    G = nR − e²     Et = n + κe     w = κR + e     m = n + 2κe + κ²R     L = 2λ + m
    A = λ + κw      B = κEt         d = A·ε − B·r  Q = ⟨d,d⟩ = λ²n + κ²GL
    KEEP_NORM   √(n/Q)·d        PLAIN   d/(λ + m)        EXTRAPOLATE   ((1 + γe/n)ε − γr)/√(1 + γ²G/n²)

The derivatives are those of F = c0·x + c1·y, x = ⟨g,ε⟩, y = ⟨g,r⟩ held fixed, with the common parts of opposite
sign cancelled by hand (for instance λ²n − nA² and 2κR·Q − κGLA), so that they stay accurate for κ → 0 and λ → ∞.
"""

import triton
import triton.language as tl

# modes
KEEP_NORM = tl.constexpr(0)
PLAIN = tl.constexpr(1)
EXTRAPOLATE = tl.constexpr(2)
SNR = tl.constexpr(3)  # of steps alone

# ops
AFFINE = tl.constexpr(0)
LM_FORWARD = tl.constexpr(1)
LM_BACKWARD = tl.constexpr(2)
LM_JVP = tl.constexpr(3)


@triton.jit
def gram_determinant(n, e, R):
    """max(nR − e², 0), exactly 0 for exactly parallel rows also where the compiler fuses multiply and subtract."""
    square = e * e
    G = tl.fma(n, R, -square) - tl.fma(e, e, -square)
    return tl.where(G < 0, 0.0, G)


@triton.jit
def lm_value(MODE: tl.constexpr, n, e, R, a, b):
    """(c0, c1); a, b = λ, κ, or a = γ in EXTRAPOLATE.

    ε = 0 gives 0; κ = 0 or γ = 0, and λ = 0 with p ∥ ε, give the identity; in PLAIN the latter gives 0.
    """
    empty = n == 0
    G = gram_determinant(n, e, R)
    if MODE == EXTRAPOLATE:
        safe = tl.where(empty, 1.0, n)
        q = e / safe
        scale = 1.0 / tl.sqrt(1.0 + a * a * (G / safe / safe))
        off = a == 0
        c0 = tl.where(empty, 0.0, tl.where(off, 1.0, (1.0 + a * q) * scale))
        c1 = tl.where(off | empty, 0.0, -a * scale)
    else:
        w = b * R + e
        B = b * (n + b * e)
        A = a + b * w
        m = n + 2.0 * b * e + b * b * R
        Q = a * a * n + b * b * G * (2.0 * a + m)
        off = b == 0
        if MODE == KEEP_NORM:
            identity = off | (Q == 0)
            scale = tl.sqrt(n / tl.where(identity, 1.0, Q))
            c0 = tl.where(empty, 0.0, tl.where(identity, 1.0, scale * A))
            c1 = tl.where(empty | identity, 0.0, -scale * B)
            bad = ((a >= 0) == 0) & (empty == 0) & (off == 0)
        else:
            M = tl.where(off, a + n, a + m)
            zero = empty | (Q == 0)
            M = tl.where(zero, 1.0, M)
            c0 = tl.where(zero, 0.0, tl.where(off, a, A) / M)
            c1 = tl.where(zero | off, 0.0, -B / M)
            bad = ((a >= 0) == 0) & (empty == 0)
        # A damping below 0 is refused where the host knows it; one of the device spoils its sample.
        c0 = tl.where(bad, float("nan"), c0)
        c1 = tl.where(bad, float("nan"), c1)
    return c0, c1


@triton.jit
def snr_value(n, R, ratio, temperature):
    """(h, √(2hT)) with h = 2(ratio·‖ξ‖/‖e‖)², n = ⟨e,e⟩, R = ⟨ξ,ξ⟩; 0 where e = 0."""
    empty = n == 0
    h = tl.where(empty, 0.0, 2.0 * ratio * ratio * R / tl.where(empty, 1.0, n))
    return h, tl.sqrt(2.0 * h * temperature)


@triton.jit
def lm_gradient(MODE: tl.constexpr, n, e, R, a, b, x, y):
    """(F_n, F_e, F_R, F_a, F_b) of F = c0·x + c1·y; F_b is 0 in EXTRAPOLATE.

    Where κ (or γ) is 0 only its own derivative looks at e, R and y: a NaN in them reaches nothing else.
    """
    empty = n == 0
    if MODE == EXTRAPOLATE:
        zero = empty | (a == 0)
        inverse = 1.0 / tl.where(empty, 1.0, n)
        q = e * inverse
        D = gram_determinant(n, e, R) * inverse * inverse
        t = 1.0 / tl.sqrt(1.0 + a * a * D)
        H = ((1.0 + a * q) * x - a * y) * t * t * a
        at = a * t * inverse
        Fn = -at * (q * x + 0.5 * (2.0 * q * q - R * inverse) * H)
        Fe = at * (x + q * H)
        FR = -0.5 * at * H
        Fa = tl.where(empty, 0.0, t * t * t * (q * x - y - a * D * x))
        Fb = tl.zeros_like(Fa)
    else:
        off = b == 0
        G = gram_determinant(n, e, R)
        w = b * R + e
        Et = n + b * e
        m = n + 2.0 * b * e + b * b * R
        A = a + b * w
        if MODE == KEEP_NORM:
            B = b * Et
            L = 2.0 * a + m
            Q = a * a * n + b * b * G * L
            Q = tl.where(off, a * a * n, Q)
            identity = Q == 0
            Q = tl.where(empty | identity, 1.0, Q)
            inverse = 1.0 / Q
            s = tl.sqrt(n * inverse)
            gd = (A * x - B * y) * inverse
            # The derivatives of κ²G and of λ²n that cancel against those of √n are already taken out.
            Fn = -s * b * (y + 0.5 * b * (e * e * L / tl.where(empty, 1.0, n) + G) * gd)
            Fe = s * b * (x - b * y - b * (b * G - e * L) * gd)
            s *= inverse
            Px = b * b * G * (2.0 * L - A) - n * (a * m + b * w * L)
            FR = 0.5 * s * b * b * (Px * x + (n * L + b * b * G) * B * y)
            Fa = s * B * ((b * G - a * e) * x + (a * n + b * b * G) * y)
            k3G = b * b * b * G
            Kx = a * a * e * (n + 2.0 * b * e) + k3G * G - a * b * G * (n + 3.0 * b * e)
            Ky = k3G * (b * G - 2.0 * a * e) - a * a * n * (n + 2.0 * b * e)
            Fb = tl.where(empty | identity, 0.0, s * (Kx * x + Ky * y))
            zero = empty | identity | off
            Fa = tl.where(zero, 0.0, Fa)
        else:
            M = tl.where(off, a + n, a + m)
            none = empty | (a * a * n + b * b * G * (2.0 * a + m) == 0)
            inverse = 1.0 / tl.where(none, 1.0, M)
            z = x + b * y  # ⟨g, ε̃⟩
            between = n - a - b * b * R  # Et − A
            Fb = tl.where(none, 0.0, ((w * between * inverse + b * R) * z - Et * y) * inverse)
            A = tl.where(off, a, A)
            Et = tl.where(off, n, Et)
            z = tl.where(off, x, z) * inverse * inverse
            Fn = -A * z
            Fe = b * between * z
            FR = b * b * Et * z
            Fn = tl.where(none, 0.0, Fn)
            Fa = tl.where(none, 0.0, Et * z)
            zero = none | off
    Fe = tl.where(zero, 0.0, Fe)
    FR = tl.where(zero, 0.0, FR)
    if MODE != PLAIN:
        Fn = tl.where(zero, 0.0, Fn)
    return Fn, Fe, FR, Fa, Fb


@triton.jit
def lm_forward(MODE: tl.constexpr, gram, coef):
    """gram (n, e, R) -> (c0, c1)."""
    b = coef[0]
    if MODE != EXTRAPOLATE:
        b = coef[1]
    c0, c1 = lm_value(MODE, gram[0], gram[1], gram[2], coef[0], b)
    if MODE != PLAIN:  # without κ the sample is copied, whatever its norm says
        c0 = tl.where(b == 0, 1.0, c0)
    return c0, c1


@triton.jit
def lm_backward(MODE: tl.constexpr, gram, coef):
    """gram (n, e, R, x, y) -> rows of d_eps over (ε, r, g), rows of d_prev over (ε, r, g), d_coef."""
    n, e, R, x, y = gram
    b = coef[0]
    if MODE != EXTRAPOLATE:
        b = coef[1]
    c0, c1 = lm_value(MODE, n, e, R, coef[0], b)
    Fn, Fe, FR, Fa, Fb = lm_gradient(MODE, n, e, R, coef[0], b, x, y)
    if MODE == EXTRAPOLATE:
        return 2.0 * Fn - Fe, Fe - 2.0 * FR, c0 - c1, Fe, 2.0 * FR, c1, Fa
    else:
        return 2.0 * Fn - Fe, Fe - 2.0 * FR, c0 - c1, Fe, 2.0 * FR, c1, Fa, Fb


@triton.jit
def lm_jvp(MODE: tl.constexpr, gram, coef):
    """gram (n, e, R, ṅ, ė, Ṙ), coef (coef, coef_t) -> coefficients of (ε, r, ε_t, r_t)."""
    n, e, R, nt, et, Rt = gram
    a = coef[0]
    b = a
    at = coef[1]
    bt = tl.zeros_like(a)
    if MODE != EXTRAPOLATE:
        b = coef[1]
        at = coef[2]
        bt = coef[3]
    one = tl.full((), 1.0, tl.float64)
    zero = tl.full((), 0.0, tl.float64)
    c0, c1 = lm_value(MODE, n, e, R, a, b)
    Fn, Fe, FR, Fa, Fb = lm_gradient(MODE, n, e, R, a, b, one, zero)
    d0 = Fn * nt + Fe * et + FR * Rt + Fa * at + Fb * bt
    Fn, Fe, FR, Fa, Fb = lm_gradient(MODE, n, e, R, a, b, zero, one)
    d1 = Fn * nt + Fe * et + FR * Rt + Fa * at + Fb * bt
    return d0, d1, c0, c1


# --- what the heavy stages ask -------------------------------------------------------------------------------------


@triton.jit
def streams_of_gram(OP: tl.constexpr, MODE: tl.constexpr, coef):
    """Which streams the Gram of this sample needs, one int32 flag a stream; () for all of them."""
    if OP == LM_FORWARD:
        kappa = coef[0 if MODE == EXTRAPOLATE else 1]
        return 1, tl.where(kappa != 0, 1, 0)
    elif OP == LM_JVP:
        kappa = coef[0 if MODE == EXTRAPOLATE else 1]
        tangent = coef[1 if MODE == EXTRAPOLATE else 3]
        return 1, tl.where((kappa != 0) | (tangent != 0), 1, 0), 1, tl.where(kappa != 0, 1, 0)
    else:
        return ()


@triton.jit
def coefficients(OP: tl.constexpr, MODE: tl.constexpr, gram, coef):
    """Coefficients of every output over the rows, output by output, then the scalars to write per sample."""
    if OP == LM_FORWARD:
        return lm_forward(MODE, gram, coef)
    elif OP == LM_BACKWARD:
        return lm_backward(MODE, gram, coef)
    elif OP == LM_JVP:
        # Gram entries (0,0) (0,1) (1,1) (0,2) (1,2) (0,3) (1,3) of the rows ε, r, ε_t, r_t
        tangent = (gram[0], gram[1], gram[2], 2.0 * gram[3], gram[4] + gram[5], 2.0 * gram[6])
        return lm_jvp(MODE, tangent, coef)
    else:
        return coef


@triton.jit
def map_kernel(
    gram, coef, out, G: tl.constexpr, M: tl.constexpr, OUT: tl.constexpr, OP: tl.constexpr, MODE: tl.constexpr
):
    """out[b] = map(gram[b], coef[b]), rows of G, M and OUT float64: the maps alone, for tests of equality."""
    sample = tl.program_id(0).to(tl.int64)
    g = ()
    for i in tl.static_range(G):
        g = g + (tl.load(gram + sample * G + i),)
    c = ()
    for i in tl.static_range(M):
        c = c + (tl.load(coef + sample * M + i),)
    if OP == LM_JVP:
        values = lm_jvp(MODE, g, c)
    else:
        values = coefficients(OP, MODE, g, c)
    for i in tl.static_range(OUT):
        tl.store(out + sample * OUT + i, values[i])
