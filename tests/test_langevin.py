"""Steps of samplers: affine_step, and the noise that every op draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cases
import marquardt as mq
import oracle
from harness import Op, Suite, Target, same_bits
from harness.declare import Refusal

f32, f64 = torch.float32, torch.float64


def call(function, tensors, scalars, **keywords):
    scalars = dict(scalars)
    if "noise_scale" in scalars:
        keywords["noise_scale"] = scalars.pop("noise_scale")
    return function(tensors, list(scalars.values()), **keywords)


def _noise(keywords, shape, batch_dims):
    if keywords.get("seed") is None:
        return None
    batch = shape[0] if batch_dims else 1
    seed = keywords["seed"].cpu().numpy()
    return (
        oracle.noise_like(shape, seed, batch_dims).reshape(batch, -1)
        if np.prod(shape)
        else np.zeros((batch, int(np.prod(shape[batch_dims:]))))
    )


def value(rows, scalars, keywords, shape, batch_dims):
    return oracle.affine_step(rows, list(scalars.values()), _noise(keywords, shape, batch_dims))


def slack(rows, scalars, keywords, shape, batch_dims, dtype):
    """Normals may be off by 4 ulp of float32, whatever the state's dtype."""
    noise = _noise(keywords, shape, batch_dims)
    if noise is None:
        return 0.0
    return np.abs(scalars["noise_scale"])[:, None] * 4 * np.spacing(np.abs(noise).astype(np.float32))


def vjp(rows, scalars, keywords, shape, batch_dims, grad):
    noise = _noise(keywords, shape, batch_dims)
    vectors = rows if noise is None else [*rows, noise]
    d_rows = [c[:, None] * grad for c, _ in zip(scalars.values(), rows)]
    products = {k: oracle.dot(grad, oracle.wide(v)) for k, v in zip(scalars, vectors, strict=True)}
    sizes = {
        k: np.sqrt(oracle.dot(grad, grad) * oracle.dot(oracle.wide(v), oracle.wide(v)))
        for k, v in zip(scalars, vectors, strict=True)
    }
    return d_rows, products, sizes


def jvp(rows, scalars, keywords, shape, batch_dims, rows_t, scalars_t):
    noise = _noise(keywords, shape, batch_dims)
    moved = oracle.affine_step(rows_t, list(scalars.values())[: len(rows)])
    return moved + oracle.affine_step(rows, list(scalars_t.values()), noise)


def sweep(full: bool):
    sizes = (3072, 65536, 262144) if full else (65536,)
    plain = [c for c in cases.AFFINE if "seed" not in c.keywords]
    return [(size, case) for size in sizes for case in plain]


def samples():
    generator = torch.Generator().manual_seed(0)

    def terms(shape, count, state=f32, model=f32):
        return [cases.gaussian(generator, shape).to(model if j else state) for j in range(count)]

    two, three = torch.tensor([0.5, -1.0], dtype=f64), torch.tensor([0.5, -1.0, 0.3], dtype=f64)
    rows, seed = torch.randn(2, 3, dtype=f64, generator=generator), torch.tensor([5, 6])
    streams = torch.tensor([[5, 6], [7, 8]])
    made = [
        ("affine_step", (terms((2, 3, 5), 2, *pair), two, None, 1))
        for pair in ((f32, f32), (f32, torch.bfloat16), (torch.float16, torch.float16), (f64, f64))
    ]
    leaves = [t.requires_grad_() for t in terms((2, 3, 4), 2)]
    strided = [t[..., ::2] for t in terms((2, 3, 8), 2)]
    made += [
        ("affine_step", (leaves, three.clone().requires_grad_(), seed, 1)),
        ("affine_step", (terms((2, 3, 4), 3), rows.clone().requires_grad_(), None, 1)),
        ("affine_step", (strided, three, streams, 1)),
        ("affine_step", ([t.transpose(1, 2) for t in terms((2, 3, 4, 5), 3)], three, None, 1)),
        ("affine_step", (terms((0, 3), 2), two, None, 1)),
        ("affine_step", (terms((3, 4), 2), two, None, 0)),
        ("affine_step", (terms((2, 3), 8), torch.ones(8, dtype=f64), None, 1)),
        ("affine_step_backward", (terms((2, 3), 1)[0], terms((2, 3), 2), three, seed, True, True, 1)),
        ("affine_step_backward", (terms((2, 3), 1)[0], terms((2, 3), 3), rows, None, False, True, 1)),
        ("affine_step_backward", (terms((0, 3), 1)[0], terms((0, 3), 2), two, None, True, False, 1)),
    ]
    return made


def many(tensors):
    return [tensors[0]] * 9


REFUSALS = (
    Refusal("no-terms", ValueError, ("terms", "0"), tensors=lambda t: []),
    Refusal("nine-terms", ValueError, ("terms", "9"), tensors=many, scalars={f"c{j}": 1.0 for j in range(9)}),
    Refusal("few-coefficients", ValueError, ("coefficients", "1", "2"), scalars={"c1": None}),
    Refusal("many-coefficients", ValueError, ("coefficients", "3", "2"), scalars={"c2": 1.0}),
    Refusal("noise-and-seed", ValueError, ("noise", "seed"), keywords={"noise": torch.ones(4, 3, 6), "seed": 1}),
    Refusal(
        "noise-and-generator", ValueError, ("noise", "generator"),
        keywords={"noise": torch.ones(4, 3, 6), "generator": torch.Generator()},
    ),
    Refusal(
        "seed-and-generator", ValueError, ("seed", "generator"),
        scalars={"noise_scale": 1.0}, keywords={"seed": 1, "generator": torch.Generator()},
    ),
    Refusal("seed-of-float", TypeError, ("seed",), scalars={"noise_scale": 1.0}, keywords={"seed": 1.5}),
    Refusal(
        "seed-of-int32", TypeError, ("seed", "int32"),
        scalars={"noise_scale": 1.0}, keywords={"seed": torch.ones(2, dtype=torch.int32)},
    ),
    Refusal(
        "seed-shape", ValueError, ("seed", "[3]"),
        scalars={"noise_scale": 1.0}, keywords={"seed": torch.ones(3, dtype=torch.int64)},
    ),
    Refusal(
        "seed-of-another-batch", ValueError, ("seed", "[3, 2]"),
        scalars={"noise_scale": 1.0}, keywords={"seed": torch.ones(3, 2, dtype=torch.int64)},
    ),
    Refusal(
        "generators-of-another-batch", ValueError, ("generator", "3"),
        scalars={"noise_scale": 1.0}, keywords={"generator": [torch.Generator() for _ in range(3)]},
    ),
    Refusal("noise-shape", ValueError, ("4, 3, 5",), keywords={"noise": torch.ones(4, 3, 5), "noise_scale": 1.0}),
    Refusal(
        "noise-dtype", TypeError, ("int64",),
        keywords={"noise": torch.ones(4, 3, 6, dtype=torch.int64), "noise_scale": 1.0},
    ),
)  # fmt: skip

AFFINE = Op(
    name="affine_step",
    function=mq.affine_step,
    reference=mq.reference.affine_step,
    call=call,
    # the sum's own order first: a case with two terms serves the tests that need one case
    cases=(cases.AFFINE[1], *(c for j, c in enumerate(cases.AFFINE) if j != 1)),
    value=value,
    vjp=vjp,
    jvp=jvp,
    slack=slack,
    argument="terms[{}]".format,
    sweep=sweep,
    samples=samples,
    refusals=REFUSALS,
)


class TestAffineStep(Suite):
    op = AFFINE


@pytest.mark.accuracy
class TestNoise:
    """What is drawn, who governs it, and that it does not depend on how a batch is cut."""

    def draw(self, target: Target, shape=(4, 1000), dtype=f32, **keywords):
        with target():
            return mq.affine_step(
                [torch.zeros(shape, dtype=dtype, device=target.device)], [0.0], noise_scale=1.0, **keywords
            )

    def seed(self, target, *values):
        return torch.tensor(values, dtype=torch.int64, device=target.device)

    def test_known_answers(self):
        """The published vectors of Philox4x32-10 fix the oracle."""
        ones = np.full(4, 0xFFFFFFFF, dtype=np.uint64)
        for counter, key, expected in (
            (np.zeros(4, dtype=np.uint64), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
            (ones, (0xFFFFFFFF, 0xFFFFFFFF), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ):
            assert tuple(int(w) for w in oracle.philox4x32(counter, key)) == expected

    def test_words_of_the_reference(self):
        """The 32-bit words are those of the oracle, bit for bit, for counters and keys of every size."""
        from marquardt.reference.noise import words

        index = torch.tensor([0, 1, 3, 4, 7, 2**20, 2**33 + 5, 2**34, 2**40 + 3])
        for seed in ((0, 0), (1, 2), (-1, -1), (2**62 + 12345, -(2**61) - 3), (2**32, 2**33)):
            found = words(torch.tensor(seed), index).numpy()
            assert np.array_equal(found, oracle.noise_words(seed, index.numpy()).astype(np.int64)), seed

    @pytest.mark.parametrize("seed", [(0, 0), (5, 7), (-1, -1), (2**62 + 99, -(2**61))], ids=str)
    def test_normals(self, target: Target, seed):
        """Within 4 ulp of Box–Muller in float64 on the same words; float64 results carry float32 normals."""
        for shape in ((3, 1000), (1, 7), (2, 3, 5, 11), (1, 70001)):
            z = self.draw(target, shape, seed=self.seed(target, *seed)).cpu().numpy().astype(np.float64)
            expected = oracle.noise_like(shape, seed)
            allowed = 4 * np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
            assert np.all(np.abs(z - expected) <= allowed)
        wide = self.draw(target, (3, 50), f64, seed=self.seed(target, *seed))
        assert torch.equal(wide, self.draw(target, (3, 50), seed=self.seed(target, *seed)).double())

    def test_narrow_results(self, target: Target):
        for dtype in (torch.bfloat16, torch.float16):
            narrow = self.draw(target, (3, 333), dtype, seed=self.seed(target, 3, 4))
            assert torch.equal(narrow, self.draw(target, (3, 333), seed=self.seed(target, 3, 4)).to(dtype))

    def test_moments(self, target: Target):
        count = 10**6
        z = self.draw(target, (10, count // 10), seed=self.seed(target, 11, 12)).double().flatten()
        assert abs(float(z.mean())) < 5 / count**0.5
        assert abs(float(z.var()) - 1) < 5 * (2 / count) ** 0.5
        assert abs(float((z**3).mean())) < 5 * (15 / count) ** 0.5
        assert abs(float((z**4).mean()) - 3) < 5 * (96 / count) ** 0.5
        assert abs(float((z[:-1] * z[1:]).mean())) < 5 / count**0.5
        assert 4.3 < float(z.abs().max()) < 6.7

    def test_same_seed_same_noise(self, target: Target):
        seed = self.seed(target, 21, 22)
        assert same_bits(self.draw(target, seed=seed), self.draw(target, seed=seed))
        assert same_bits(self.draw(target, seed=77), self.draw(target, seed=77))
        for other in (self.seed(target, 22, 22), self.seed(target, 21, 23)):
            assert not torch.equal(self.draw(target, seed=seed), self.draw(target, seed=other))
        assert not torch.equal(self.draw(target, seed=77), self.draw(target, seed=78))

    def test_manual_seed_governs(self, target: Target):
        draws = []
        for value in (1, 1, 2):
            torch.manual_seed(value)
            draws.append([self.draw(target), self.draw(target)])
        assert same_bits(draws[0][0], draws[1][0]) and same_bits(draws[0][1], draws[1][1])
        assert not torch.equal(draws[0][0], draws[0][1]) and not torch.equal(draws[0][0], draws[2][0])

    def test_generator(self, target: Target):
        """A generator governs alone: the default one is neither read nor moved."""
        torch.manual_seed(3)
        before = torch.get_rng_state()
        first, again = (self.draw(target, generator=torch.Generator().manual_seed(9)) for _ in range(2))
        assert same_bits(first, again) and torch.equal(torch.get_rng_state(), before)
        generator = torch.Generator().manual_seed(9)
        assert same_bits(self.draw(target, generator=generator), first)
        assert not torch.equal(self.draw(target, generator=generator), first)

    def test_list_of_generators(self, target: Target):
        """Each sample has its own stream: a batch may be split, reordered, and drawn sample by sample."""

        def generators(*seeds):
            return [torch.Generator().manual_seed(s) for s in seeds]

        whole = self.draw(target, generator=generators(1, 2, 3, 4))
        front = self.draw(target, (2, 1000), generator=generators(1, 2))
        back = self.draw(target, (2, 1000), generator=generators(3, 4))
        assert same_bits(whole, torch.cat([front, back]))
        assert same_bits(self.draw(target, (1, 1000), generator=generators(3)), whole[2:3])
        assert same_bits(self.draw(target, generator=generators(4, 3, 2, 1)), whole.flip(0))

    def test_seed_per_sample(self, target: Target):
        seeds = torch.tensor([[1, 2], [3, 4], [1, 2], [-5, 2**40]], device=target.device)
        whole = self.draw(target, seed=seeds)
        assert same_bits(whole[0], whole[2]) and not torch.equal(whole[0], whole[1])
        expected = oracle.noise_like((4, 1000), seeds.cpu().numpy())
        assert np.abs(whole.cpu().double().numpy() - expected).max() < 4e-6
        assert same_bits(self.draw(target, (1, 1000), seed=seeds[1]), whole[1:2])

    def test_logical_order(self, target: Target):
        """Element i of the row-major order, whatever the strides of the state."""
        seed = self.seed(target, 31, 32)
        plain = self.draw(target, (2, 3, 4, 5), seed=seed)
        for layout in (
            torch.zeros(2, 3, 4, 5, device=target.device).contiguous(memory_format=torch.channels_last),
            torch.zeros(2, 3, 5, 4, device=target.device).transpose(2, 3),
            torch.zeros(5, 4, 3, 2, device=target.device).permute(3, 2, 1, 0),
            torch.zeros(2, 3, 4, 10, device=target.device)[..., ::2],
        ):
            with target():
                assert torch.equal(mq.affine_step([layout], [0.0], noise_scale=1.0, seed=seed), plain)
                out = torch.empty_like(plain)
                mq.affine_step([layout], [0.0], noise_scale=1.0, seed=seed, out=out)
                assert same_bits(out, plain)
        assert same_bits(self.draw(target, (2, 60), seed=seed).view(2, 3, 4, 5), plain)
        assert same_bits(self.draw(target, (120,), seed=seed, batch_dims=0).view(2, 3, 4, 5), plain)

    def test_given_noise(self, target: Target):
        """`noise=` is one more term, differentiable like the others."""
        x, xi = (torch.randn(3, 40, dtype=f64, device=target.device).requires_grad_() for _ in range(2))
        scale = torch.tensor(0.3, dtype=f64, requires_grad=True)
        with target():
            out = mq.affine_step([x], [2.0], noise_scale=scale, noise=xi)
        torch.testing.assert_close(out, 2 * x + scale * xi)
        d_x, d_xi, d_scale = torch.autograd.grad(out.sum(), (x, xi, scale))
        assert (
            bool((d_x == 2).all())
            and torch.allclose(d_xi, scale.to(d_xi).expand_as(xi))
            and torch.allclose(d_scale, xi.sum().to(d_scale))
        )
        eight = [x.detach()] * 8
        with target():
            full = mq.affine_step(eight, [0.1] * 8, noise_scale=0.5, noise=xi.detach())
        torch.testing.assert_close(full, 0.8 * x.detach() + 0.5 * xi.detach())

    def test_zero_scale_draws_nothing(self, target: Target):
        """No noise is asked for: the generator stays where it is."""
        x = torch.ones(2, 30, device=target.device)
        before = torch.get_rng_state()
        with target():
            assert torch.equal(mq.affine_step([x], [2.0]), 2 * x)
            assert torch.equal(mq.affine_step([x], [2.0], noise_scale=0.0), 2 * x)
        assert torch.equal(torch.get_rng_state(), before)

    def test_backward_draws_the_same_noise(self, target: Target):
        """The gradient of the noise scale is ⟨g, ξ⟩ with the noise of the forward call."""
        scale = torch.tensor(1.0, dtype=f64, requires_grad=True)
        torch.manual_seed(4)
        x = torch.zeros(3, 500, dtype=f64, device=target.device)
        with target():
            out = mq.affine_step([x], [1.0], noise_scale=scale)
            g = torch.linspace(-1, 1, x.numel(), dtype=f64, device=target.device).view_as(x)
            out.backward(g)
        torch.testing.assert_close(scale.grad, (out.detach() * g).sum().cpu(), rtol=1e-12, atol=1e-12)

    def test_vmap_randomness(self, target: Target):
        x = torch.zeros(3, 2, 20, device=target.device)

        def step(t):
            return mq.affine_step([t], [1.0], noise_scale=1.0)

        with target():
            different = torch.func.vmap(step, randomness="different")(x)
            same = torch.func.vmap(step, randomness="same")(x)
            with pytest.raises(RuntimeError):
                torch.func.vmap(step)(x)
        assert not torch.equal(different[0], different[1]) and torch.equal(same[0], same[1])

    def test_checkpoint(self, target: Target):
        """Recomputation in the backward pass sees the same noise."""
        x = torch.randn(2, 30, dtype=f64, device=target.device, requires_grad=True)

        def step(t):
            with target():
                return mq.affine_step([t], [1.0], noise_scale=0.5) ** 2

        grads = []
        for run in (step, lambda t: torch.utils.checkpoint.checkpoint(step, t, use_reentrant=False)):
            torch.manual_seed(8)
            grads.append(torch.autograd.grad(run(x).sum(), x)[0])
        assert torch.equal(*grads)

    @pytest.mark.compile
    def test_compiled(self, target: Target):
        """Under compile the default generator and `seed=` are taken; a seed is data, not a constant."""
        from harness import native_only

        native_only()
        torch._dynamo.reset()
        x = torch.zeros(2, 30, device=target.device)
        with target():
            seeded = torch.compile(
                lambda s: mq.affine_step([x], [1.0], noise_scale=1.0, seed=s),
                fullgraph=True,
                backend="aot_eager",
            )
            for values in ((1, 2), (3, 4)):
                seed = self.seed(target, *values)
                assert same_bits(seeded(seed), self.draw(target, (2, 30), seed=seed))
            drawn = torch.compile(
                lambda t: mq.affine_step([t], [1.0], noise_scale=1.0), fullgraph=True, backend="aot_eager"
            )
            torch.manual_seed(5)
            first, second = drawn(x), drawn(x)
            torch.manual_seed(5)
            assert torch.equal(first, drawn(x)) and not torch.equal(first, second)
