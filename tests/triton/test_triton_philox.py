"""Words bit by bit, normals in ulp, and which element takes which normal."""

import numpy as np
import pytest
import torch


def philox(seed, counter):
    """uint32 words [len(counter), 4] of Philox4x32-10, by the published recurrence."""
    mask = np.uint64(0xFFFFFFFF)
    stream, key = np.uint64(seed[1] & (2**64 - 1)), np.uint64(seed[0] & (2**64 - 1))
    c = [counter & mask, counter >> np.uint64(32), np.full_like(counter, stream & mask)]
    c.append(np.full_like(counter, stream >> np.uint64(32)))
    k0, k1 = key & mask, key >> np.uint64(32)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ k0, p1 & mask, (p0 >> np.uint64(32)) ^ c[3] ^ k1, p0 & mask]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & mask, (k1 + np.uint64(0xBB67AE85)) & mask
    return np.stack(c, axis=1).astype(np.uint32)


def box_muller(w0, w1):
    """float64 normals of the float32 (u, v) of the words."""
    u = (w0.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32).astype(np.float64)
    v = w1.astype(np.float32).astype(np.float64) * 2.0**-32
    radius = np.sqrt(-2 * np.log(u))
    q = np.round(4 * v)  # quarter turns taken out first, so that zeros of cos and sin are exact
    f = np.pi / 2 * (4 * v - q)
    turn = np.array([1, 1j, -1, -1j])[q.astype(int) % 4]
    z = (np.cos(f) + 1j * np.sin(f)) * turn
    return radius * z.real, radius * z.imag


def normals(seed, index):
    """float64 normals of the elements `index`."""
    w = philox(seed, (index // 4).astype(np.uint64))
    pairs = np.stack([*box_muller(w[:, 0], w[:, 1]), *box_muller(w[:, 2], w[:, 3])], axis=1)
    return pairs[np.arange(len(index)), index % 4]


def ulps(found, exact):
    """|found − exact| in units of the last float32 place of exact."""
    place = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return np.abs(found.astype(np.float64) - exact) / place


def test_known_answers():
    """The oracle itself, against the Random123 vectors."""
    assert philox((0, 0), np.zeros(1, np.uint64))[0].tolist() == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]
    found = philox((-1, -1), np.full(1, 2**64 - 1, np.uint64))[0].tolist()
    assert found == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize(
    "seed", [(0, 0), (1, 2), (-1, -1), (0x243F6A8885A308D3, 0x13198A2E03707344), (2**63 - 1, -5)]
)
def test_words(kernels, seed):
    count = 100
    out = torch.zeros(count, 4, dtype=torch.int64)
    kernels.philox.words_kernel[(2,)](torch.tensor(seed), out, count, BLOCK=64)
    assert np.array_equal(out.numpy().astype(np.uint32), philox(seed, np.arange(count, dtype=np.uint64)))


def test_normals_within_four_ulp(kernels):
    rng = np.random.default_rng(0)
    edge = np.array(
        [0, 1, 2, 2**30, 2**31, 2**30 * 3, 2**32 - 1, 2**32 - 129, 2**30 - 1, 2**30 + 1, 2**29], np.uint64
    )
    w0 = np.concatenate([rng.integers(0, 2**32, 20000, dtype=np.uint64), np.repeat(edge, len(edge))])
    w1 = np.concatenate([rng.integers(0, 2**32, 20000, dtype=np.uint64), np.tile(edge, len(edge))])
    near = rng.integers(0, 2**10, 2000, dtype=np.uint64)  # angles near the axes, radii near 0
    w0 = np.concatenate([w0, np.uint64(2**32 - 1) - (near << np.uint64(6))])
    w1 = np.concatenate([w1, (np.uint64(2**30) * (near % np.uint64(4)) + near) & np.uint64(2**32 - 1)])
    out = torch.zeros(len(w0), 2)
    words = [torch.from_numpy(w.astype(np.int64)) for w in (w0, w1)]
    kernels.philox.box_muller_kernel[(-(-len(w0) // 4096),)](*words, out, len(w0), BLOCK=4096)
    exact = box_muller(w0, w1)
    for column in range(2):
        assert ulps(out[:, column].numpy(), exact[column]).max() <= 4


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 1023), (2, 4, 64)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_element_takes_its_own_normal(kernels, shape, per_sample):
    """Index in the call for one seed, within the sample for a seed each; also where samples start inside a counter."""
    size = int(np.prod(shape[1:]))
    seed = torch.tensor([[7 + b, 9] for b in range(shape[0])]) if per_sample else torch.tensor([7, 9])
    coef = torch.tensor([0.0, 1.0], dtype=torch.float64)
    table = coef.expand(shape[0], 2)  # scalars per sample: samples are not merged into one
    for c in (coef, table):
        out = kernels.frame.affine_step([torch.zeros(shape)], c, seed, 1).reshape(shape[0], size).numpy()
        for b in range(shape[0]):
            index = np.arange(size) + (0 if per_sample else b * size)
            exact = normals(seed[b].tolist() if per_sample else (7, 9), index)
            assert ulps(out[b], exact).max() <= 4


def test_noise_follows_the_logical_index_in_any_layout(kernels):
    seed = torch.tensor([3, 4])
    coef = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x = torch.zeros(2, 3, 5, 7)
    plain = kernels.frame.affine_step([x], coef, seed, 1)
    last = kernels.frame.affine_step([x.to(memory_format=torch.channels_last)], coef, seed, 1)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, last)
