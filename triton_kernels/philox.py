"""Noise as a function of the element's index: Philox4x32-10 words, Box–Muller normals.

    key = seed[0];  counter = (⌊i/4⌋ low, ⌊i/4⌋ high, seed[1] low, seed[1] high)
    u = (w₀ + ½)·2⁻³²  ∈ (0, 1],  v = w₁·2⁻³²,  z = √(−2 ln u)·(cos 2πv, sin 2πv)

Four words w₀..w₃ give the normals of the elements 4c .. 4c + 3.
"""

import triton
import triton.language as tl


@triton.jit
def philox_words(seed, counter):
    """The four uint32 words of each counter (int64 block); `seed` points at two int64."""
    key = tl.load(seed)
    stream = tl.load(seed + 1).to(tl.uint64)
    wide = counter.to(tl.uint64)
    c0 = (wide & 0xFFFFFFFF).to(tl.uint32)
    c1 = (wide >> 32).to(tl.uint32)
    c2 = (stream & 0xFFFFFFFF).to(tl.uint32) + tl.zeros_like(c0)
    c3 = (stream >> 32).to(tl.uint32) + tl.zeros_like(c0)
    return tl.philox(key, c0, c1, c2, c3)


@triton.jit
def box_muller(w0, w1):
    """Two float32 normals from two words, each within 4 ulp of the exact value of the float32 (u, v)."""
    # The product is exact, so a fused and an unfused multiply-add give the same u.
    u = w0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt_rn(-2.0 * tl.log(u))

    # 2πv = (π/2)·(q + f) with f in [−½, ½] exact: cos and sin keep relative accuracy at their zeros.
    t = w1.to(tl.float32) * 9.313225746154785e-10
    q = tl.floor(t + 0.5)
    f = t - q
    s = f * f
    # Taylor in f; π/2 is split in two floats, the rest is below half an ulp for |f| ≤ ½.
    odd = 1.6044118478735975e-4
    odd = odd * s + -4.681754135318687e-3
    odd = odd * s + 7.969262624616703e-2
    odd = odd * s + -0.6459640975062462
    odd = odd * s + -4.371139006309477e-8
    sine = f * 1.5707963705062866 + f * odd
    even = -2.5202042373060596e-5
    even = even * s + 9.192602748394263e-4
    even = even * s + -2.0863480763352957e-2
    even = even * s + 0.253669507901048
    even = even * s + -1.2337005501361697
    cosine = even * s + 1.0

    quadrant = q.to(tl.int32) & 3
    swap = (quadrant & 1) == 1
    x = tl.where(swap, sine, cosine)
    y = tl.where(swap, cosine, sine)
    x = tl.where((quadrant == 1) | (quadrant == 2), -x, x)
    y = tl.where(quadrant >= 2, -y, y)
    return radius * x, radius * y


@triton.jit
def normals(seed, first, BLOCK: tl.constexpr):
    """float32 [BLOCK] normals of the elements first, first + 1, ...; `first` is a multiple of 4."""
    counter = first // 4 + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = philox_words(seed, counter)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (BLOCK,))


@triton.jit
def words_kernel(seed, out, count, BLOCK: tl.constexpr):
    """out[c, 0:4] = words of counter c, as int64: what the tests compare bit by bit."""
    counter = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    words = philox_words(seed, counter)
    for j in tl.static_range(4):
        tl.store(out + counter * 4 + j, words[j].to(tl.int64), mask=counter < count)


@triton.jit
def box_muller_kernel(w0, w1, out, count, BLOCK: tl.constexpr):
    """out[i, 0:2] = the normals of the words w0[i], w1[i] (int64): what the tests compare in ulp."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    a = tl.load(w0 + i, mask=inside, other=0).to(tl.uint32)
    b = tl.load(w1 + i, mask=inside, other=0).to(tl.uint32)
    x, y = box_muller(a, b)
    tl.store(out + i * 2, x, mask=inside)
    tl.store(out + i * 2 + 1, y, mask=inside)
