"""CUDA kernels on a GPU: devices, streams, graphs, memory, and agreement with the definition and the CPU.

Values, gradients, strides and errors of every op are tested on the GPU by the harness, which finds it by itself. These
tests are about what only a GPU has.
"""

from __future__ import annotations

import gc
import itertools
import threading

import pytest
import torch

import marquardt as mq
from harness import INTERPRETED, PAIRS, native_only
from harness.declare import dtype_name
from marquardt import backends


def _why_not() -> str | None:
    if INTERPRETED:
        return "the Triton interpreter runs on the CPU"
    if not torch.cuda.is_available():
        return "no GPU"
    return backends.reasons("lm_direction", torch.device("cuda", 0))["cuda"]


REASON = _why_not()
pytestmark = [
    pytest.mark.accuracy,
    pytest.mark.skipif(REASON is not None, reason=f"no CUDA kernels here: {REASON}"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
f32, f64 = torch.float32, torch.float64


@pytest.fixture(autouse=True)
def _auto():
    native_only()
    with mq.use_backend("auto"):
        yield
    if REASON is None:
        torch.cuda.synchronize()


def make(shape=(3, 4, 32, 32), pair=(f32, f32), device="cuda", seed=0):
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn(shape, generator=generator, dtype=f64)
    prev = 0.9 * eps + 0.3 * torch.randn(shape, generator=generator, dtype=f64)
    return eps.to(device, pair[0]), prev.to(device, pair[1])


def direction(eps, prev, **keywords):
    return mq.lm_direction(eps, prev, **{"damping": 0.1, "kappa": 0.3, **keywords})


def step(eps, prev, seed=None, **keywords):
    """A seed that lies on the device can be captured; one that is drawn moves the generator."""
    return mq.affine_step([eps, prev], [0.75, -0.5], noise_scale=0.25, seed=seed, **keywords)


def close(found, expected, dtype) -> None:
    scale = max(torch.finfo(dtype).eps, 1e-14)  # float64 sums of a million products differ by their order
    torch.testing.assert_close(found, expected, rtol=4 * scale, atol=4 * scale * float(expected.abs().max()))


def test_auto_takes_the_cuda_kernels():
    eps, prev = make()
    found = mq.explain(mq.lm_direction, eps, prev, damping=0.1, kappa=0.3)
    assert found.backend == "cuda" and found.plan
    assert "plan: " in str(found)
    direction(eps, prev)
    assert eps.device in backends.native_devices("lm_direction")


@pytest.mark.parametrize("pair", PAIRS, ids=dtype_name)
class TestAgreement:
    SHAPES = ((1, 1), (3, 17), (2, 4, 64, 64), (5, 70001), (1, 1 << 20), (700, 33))

    def test_with_the_definition_and_the_cpu(self, pair):
        for shape in self.SHAPES:
            eps, prev = make(shape, pair)
            for keywords in (
                {},
                {"keep_norm": False},
                {"damping": None, "kappa": None, "extrapolation": 0.5},
                {"kappa": torch.linspace(0, 0.6, shape[0], device="cuda")},
            ):
                found = direction(eps, prev, **keywords)
                with mq.use_backend("reference"):
                    close(found, direction(eps, prev, **keywords), pair[0])
                host = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
                close(found.cpu(), direction(eps.cpu(), prev.cpu(), **host), pair[0])

    def test_noise(self, pair):
        """The same words, so the same normals to a few ulp, as on the CPU."""
        for shape in self.SHAPES:
            eps, prev = make(shape, pair)
            seed = torch.tensor([11, 5])
            found = step(eps, prev, seed.cuda())
            # float64 outputs carry float32 normals
            close(found.cpu(), step(eps.cpu(), prev.cpu(), seed), f32 if pair[0] == f64 else pair[0])

    def test_steps(self, pair):
        """lm_step with all it has: table and numbers, noise, y, guided outputs, x' twice."""
        row = (3.0, 0.4, 0.75, 0.9, 0.5, 0.1, 0.2, 1.0, -0.35, 0.5, 0.25, 0.4, -0.3, 0.7, 0.6, 0.1, -0.4)
        seed, wanted = torch.tensor([11, 5]), 1 + 4 + 8 + 16
        for shape in self.SHAPES:
            x, prev = make(shape, pair)
            table = torch.tensor([row] * shape[0], dtype=f64)
            table[0, 1] = 0.0  # κ
            for coef in (torch.tensor(row, dtype=f64), table):
                host = [x.cpu(), [prev.flip(0).cpu(), (0.5 * x).to(pair[1]).cpu()], prev.cpu()]
                device = [x, [t.cuda() for t in host[1]], prev]
                there = coef if coef.dim() == 1 else coef.cuda()
                found = torch.ops.marquardt.lm_step(*device, there, seed.cuda(), 0, wanted, True, 1)
                expected = torch.ops.marquardt.lm_step(*host, coef, seed, 0, wanted, True, 1)
                for a, b in zip(found, expected, strict=True):
                    close(
                        a.cpu(), b, f32 if b.dtype == f64 else b.dtype
                    )  # float64 outputs carry float32 normals

    def test_gradients(self, pair):
        for shape in ((2, 4, 64, 64), (5, 70001)):
            leaves = [t.requires_grad_() for t in make(shape, pair)]
            kappa = torch.full((shape[0],), 0.3, device="cuda", dtype=f64, requires_grad=True)
            weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(leaves[0])
            results = []
            for name in ("cuda", "reference"):
                with mq.use_backend(name):
                    out = direction(*leaves, kappa=kappa)
                    results.append(torch.autograd.grad(out, (*leaves, kappa), weight))
            for found, expected in zip(*results, strict=True):
                dtype = f32 if found.dtype == f64 and pair[0] != f64 else found.dtype
                torch.testing.assert_close(
                    found,
                    expected,
                    rtol=1e-2 if dtype.itemsize == 2 else 2e-5,
                    atol=1e-5 * float(expected.abs().max()),
                )


def test_repeats_bit_for_bit():
    for shape in ((3, 4, 32, 32), (1, 1 << 20), (40, 5000)):
        eps, prev = make(shape)
        seed = torch.tensor([1, 2], device="cuda")
        first = direction(eps, prev), step(eps, prev, seed)
        for _ in range(5):
            assert torch.equal(direction(eps, prev), first[0]) and torch.equal(
                step(eps, prev, seed), first[1]
            )


def test_scalars_of_every_kind_agree():
    """Host numbers, 0-dim tensors on either side, one number per sample, and mixtures of them."""
    eps, prev = make()
    expected = direction(eps, prev)
    kinds = (0.3, torch.tensor(0.3), torch.tensor(0.3, device="cuda"), torch.full((3,), 0.3, device="cuda"))
    for damping, kappa in itertools.product(
        (0.1, torch.tensor(0.1), torch.full((3,), 0.1, device="cuda")), kinds
    ):
        found = direction(eps, prev, damping=damping, kappa=kappa)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_bad_numbers_on_the_device_stay_in_their_sample():
    """Nothing is raised, because nothing is waited for; other samples are untouched."""
    eps, prev = make()
    kappa = torch.tensor([0.3, float("nan"), 0.3], device="cuda", dtype=f64)
    out = direction(eps, prev, kappa=kappa)
    expected = direction(eps, prev)
    assert torch.equal(out[0], expected[0]) and torch.equal(out[2], expected[2])
    assert bool(out[1].isnan().all())
    damping = torch.tensor([0.1, -1.0, 0.1], device="cuda", dtype=f64)
    assert bool(direction(eps, prev, damping=damping)[1].isnan().all())
    with pytest.raises(ValueError, match="damping must be finite"):
        direction(eps, prev, damping=-1.0)


def test_jvp_with_numbers_on_both_sides():
    """One tangent per sample for a host number: the table is made on the device."""
    eps, prev = make((3, 500), (f64, f64))
    kappa = torch.full((3,), 0.3, device="cuda", dtype=f64)

    def f(kappa):
        return direction(eps, prev, kappa=kappa)

    _, found = torch.func.jvp(f, (kappa,), (torch.ones_like(kappa),))
    torch.testing.assert_close(found, (f(kappa + 1e-6) - f(kappa - 1e-6)) / 2e-6, rtol=1e-6, atol=1e-8)
    coef = torch.tensor([0.1, 0.3], dtype=f64)
    rows = torch.stack([torch.zeros(3, dtype=f64), torch.ones(3, dtype=f64)], 1).cuda()
    zero = torch.zeros_like(eps)
    mixed = torch.ops.marquardt.lm_direction_jvp(eps, prev, coef, zero, zero, rows, 0, 1)
    torch.testing.assert_close(mixed, found)


def test_without_prev_and_a_number_per_sample():
    eps, _ = make((3, 500))
    damping = torch.tensor([0.0, 1.0, 1e3], device="cuda")
    found = mq.lm_direction(eps, damping=damping, keep_norm=False)
    n = eps.double().square().sum(1)
    torch.testing.assert_close(found, (eps * (damping / (damping + n))[:, None]).float(), rtol=1e-6, atol=0)


class TestGenericEngine:
    def test_matrices_of_host_and_device(self):
        streams = [t.flatten(1) for t in make((3, 4, 20, 20))]
        shared = torch.tensor([[1.0, -2.0], [0.5, 0.25], [0.0, 1.0]], dtype=f64)
        each = shared.cuda().expand(3, 3, 2)
        gram = torch.ops.marquardt._frame_gram(streams, None, None, None, False, True, 1)
        stack = torch.stack(streams, 1).double()
        torch.testing.assert_close(gram, stack @ stack.transpose(1, 2))
        one, other = (
            torch.ops.marquardt._frame_apply(streams, c, None, None, None, False, 1)
            for c in (shared, each.contiguous())
        )
        strided = torch.ops.marquardt._frame_apply(streams, each, None, None, None, False, 1)
        for a, b, c, row in zip(one, other, strided, shared.tolist(), strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)
            torch.testing.assert_close(a, row[0] * streams[0] + row[1] * streams[1])

    def test_matrices_on_the_wrong_side(self):
        streams = list(make((3, 40)))
        shared = torch.eye(2, dtype=f64)
        with pytest.raises(
            RuntimeError, match="c must be on the CPU when it is shared by the batch, got cuda:0"
        ):
            torch.ops.marquardt._frame_apply(streams, shared.cuda(), None, None, None, False, 1)
        with pytest.raises(RuntimeError, match=r"c must be on the data's device \(cuda:0\), got cpu"):
            each = shared.expand(3, 2, 2).contiguous()
            torch.ops.marquardt._frame_apply(streams, each, None, None, None, False, 1)


class TestDevices:
    @pytest.mark.errors
    def test_mixed_with_the_cpu(self):
        """Both devices are named, whichever of the tensors comes first."""
        eps, prev = make()
        with pytest.raises(ValueError, match=r"prev must be on the device of eps \(cuda:0\), got cpu"):
            direction(eps, prev.cpu())
        with pytest.raises(ValueError, match=r"prev must be on the device of eps \(cpu\), got cuda:0"):
            direction(eps.cpu(), prev)
        with pytest.raises(
            ValueError, match=r"terms\[1\] must be on the device of terms\[0\] \(cuda:0\), got cpu"
        ):
            mq.affine_step([eps, prev.cpu()], [1.0, 2.0])
        with pytest.raises(ValueError, match=r"out must be on the device of eps \(cuda:0\), got cpu"):
            direction(eps, prev, out=torch.empty(eps.shape))
        with pytest.raises(ValueError, match=r"seed must be on the data's device \(cuda:0\), got cpu"):
            step(eps, prev, torch.tensor([1, 2]))

    @pytest.mark.errors
    def test_scalars_on_the_wrong_side(self):
        eps, prev = make()
        call = torch.ops.marquardt._lm_direction
        with pytest.raises(
            RuntimeError, match="coef must be on the CPU when it is shared by the batch, got cuda:0"
        ):
            call(eps, prev, torch.tensor([0.1, 0.3], dtype=f64, device="cuda"), 0, 1)
        with pytest.raises(RuntimeError, match=r"coef must be on the data's device \(cuda:0\), got cpu"):
            call(eps, prev, torch.full((3, 2), 0.1, dtype=f64), 0, 1)

    @two_gpus
    def test_not_the_current_device(self):
        eps, prev = make(device="cuda:1")
        with torch.cuda.device(0):
            out = direction(eps, prev)
            noisy = step(eps, prev, torch.tensor([1, 2], device="cuda:1"))
            assert torch.cuda.current_device() == 0
        assert out.device == noisy.device == torch.device("cuda:1")
        here = [t.to("cuda:0") for t in (eps, prev)]
        assert torch.equal(out.to("cuda:0"), direction(*here))
        assert torch.equal(noisy.to("cuda:0"), step(*here, torch.tensor([1, 2], device="cuda:0")))
        leaf = eps.clone().requires_grad_()
        with torch.cuda.device(0):
            direction(leaf, prev).sum().backward()
        assert leaf.grad.device == torch.device("cuda:1") and bool(leaf.grad.isfinite().all())

    @two_gpus
    @pytest.mark.errors
    def test_two_gpus_mixed(self):
        eps, prev = make()
        with pytest.raises(ValueError, match=r"prev must be on the device of eps \(cuda:0\), got cuda:1"):
            direction(eps, prev.to("cuda:1"))

    def test_from_another_thread(self):
        eps, prev = make()
        found = []
        thread = threading.Thread(target=lambda: found.append(direction(eps, prev)))
        thread.start()
        thread.join()
        assert torch.equal(found[0], direction(eps, prev))


class TestStreams:
    def test_side_stream(self):
        """Work is ordered behind what the current stream does before it, and in no other stream."""
        eps, prev = make((8, 1 << 18))
        expected = direction(2 * eps, prev)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            doubled = eps * 2  # not there before the sleep is over
            out = direction(doubled, prev)
        side.synchronize()
        assert torch.equal(out, expected)

    def test_never_waits(self):
        """A call returns while the stream is still busy, with numbers on the device and workspaces too."""
        eps, prev = make((2, 1 << 20))
        kappa = torch.tensor([0.1, 0.2], device="cuda")
        seed = torch.tensor([1, 2], device="cuda")

        def all_calls():
            return (
                direction(eps, prev), direction(eps, prev, kappa=kappa), step(eps, prev, seed),
                mq.lm_direction(eps, damping=kappa, keep_norm=False),
                direction(eps, prev, damping=torch.tensor(0.1), kappa=kappa), step(eps, prev, 3),
            )  # fmt: skip

        all_calls()  # memory is allocated once
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000_000)
        marker = torch.cuda.Event()
        marker.record()
        all_calls()
        assert not marker.query(), "a call waited for the device"
        torch.cuda.synchronize()


class TestGraphs:
    CALLS = {
        "shared": lambda a: direction(a.eps, a.prev, out=a.out),
        "new output": lambda a: a.out.copy_(direction(a.eps, a.prev)),
        "per sample": lambda a: direction(a.eps, a.prev, kappa=a.kappa, out=a.out),
        "mixed numbers": lambda a: direction(
            a.eps, a.prev, damping=torch.tensor(0.1), kappa=a.kappa, out=a.out
        ),
        "without prev": lambda a: mq.lm_direction(a.eps, damping=a.kappa, keep_norm=False, out=a.out),
        "noise": lambda a: step(a.eps, a.prev, a.seed, out=a.out),
        "seed of the host": lambda a: step(a.eps, a.prev, 3, out=a.out),
        "strided": lambda a: a.out.copy_(direction(a.eps, a.prev.mT.contiguous().mT)),
    }

    class Buffers:
        def __init__(self, shape):
            self.eps, self.prev = make(shape)
            self.out = torch.empty_like(self.eps)
            self.kappa = torch.linspace(0.1, 0.5, shape[0], device="cuda")
            self.seed = torch.tensor([3, 4], device="cuda")

    @pytest.fixture(params=CALLS, ids=list(CALLS))
    def call(self, request):
        return self.CALLS[request.param]

    @pytest.mark.parametrize("shape", [(2, 16, 16), (3, 64, 1024), (1, 1024, 2048)], ids=str)
    @pytest.mark.parametrize("side", [False, True], ids=["graph's stream", "side stream"])
    def test_replay_sees_new_data(self, call, shape, side: bool):
        a = self.Buffers(shape)
        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            for _ in range(2):
                call(a)
        torch.cuda.current_stream().wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream() if side else None
        with torch.cuda.graph(graph, stream=stream):
            call(a)
        for seed in (1, 2):
            eps, prev = make(shape, seed=seed)
            a.eps.copy_(eps)
            a.prev.copy_(prev)
            a.kappa.mul_(0.5)
            a.seed.add_(7)
            a.out.fill_(float("nan"))
            graph.replay()
            replayed = a.out.clone()
            call(a)
            assert torch.equal(replayed, a.out)

    def test_gradients_are_captured(self):
        eps, prev = make((4, 4, 32, 32))
        leaf = eps.clone().requires_grad_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                (grad,) = torch.autograd.grad(direction(leaf, prev).square().sum(), leaf)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (grad,) = torch.autograd.grad(direction(leaf, prev).square().sum(), leaf)
        with torch.no_grad():
            leaf.mul_(-0.5)
        graph.replay()
        (expected,) = torch.autograd.grad(direction(leaf, prev).square().sum(), leaf)
        assert torch.equal(grad, expected)


@pytest.mark.errors
def test_out_of_memory():
    """torch's own exception, with size and device; the next call works."""
    eps, prev = make()
    free, total = torch.cuda.mem_get_info()
    gc.collect()
    torch.cuda.empty_cache()
    huge = torch.empty(1, device="cuda").expand(
        1, total // 2
    )  # 2 bytes per byte that exist, in four bytes of memory
    before = torch.cuda.memory_allocated()
    with pytest.raises(torch.OutOfMemoryError, match=r"MiB could not be allocated on cuda:0"):
        mq.affine_step([huge], [2.0])
    assert torch.cuda.memory_allocated() == before
    assert bool(direction(eps, prev).isfinite().all())


def test_more_samples_than_a_grid_has_rows():
    """Grids have limits of 65535 in two of their dimensions, and 2³¹ in the other."""
    eps, prev = make((70000, 8))
    close(direction(eps, prev).cpu(), direction(eps.cpu(), prev.cpu()), f32)


@pytest.mark.full
def test_more_than_two_to_the_31_elements():
    """Addresses are 64 bits wide."""
    size = (1 << 31) + 4096
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * 2 * size:
        pytest.skip("needs 13 GB of GPU memory")
    x = torch.zeros(1, size, dtype=torch.bfloat16, device="cuda")
    x[0, -5:] = 3.0
    out = mq.affine_step([x], [2.0])
    assert out[0, -5:].tolist() == [6.0] * 5 and int(out[0, :-5].count_nonzero()) == 0
    kept = mq.lm_direction(x, x, damping=1.0, kappa=0.5, out=out)
    assert torch.allclose(kept[0, -5:], x[0, -5:])
