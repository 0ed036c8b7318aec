"""The CUDA side without a GPU: what the library registers, that it loads without a driver, how programs are traced."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import marquardt as mq
from harness import INTERPRETED, native_only
from marquardt import backends, gpu
from marquardt.declare import registry

has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key


@pytest.fixture(autouse=True)
def _native():
    native_only()


class TestRegistrations:
    pytestmark = pytest.mark.opcheck

    @pytest.fixture
    def cuda_build(self):
        if gpu.versions() is None:
            pytest.skip("the native library was built without CUDA kernels")

    @pytest.mark.parametrize("name", sorted(registry))
    def test_no_autograd_in_the_way(self, name: str):
        """A fallthrough at both keys, so that a call does not pass the fallback that looks for gradients."""
        for key in ("AutogradCPU", "AutogradCUDA"):
            assert has_kernel(f"marquardt::_{name}", key), key
        assert not has_kernel(f"marquardt::_{name}", "AutogradXPU")

    @pytest.mark.parametrize("name", sorted(registry))
    def test_every_operator_has_a_cuda_kernel(self, cuda_build, name: str):
        variants = [name, f"_{name}"] + ([f"{name}_out", f"_{name}_out"] if registry[name].has_out else [])
        for variant in variants:
            assert has_kernel(f"marquardt::{variant}", "CPU") and has_kernel(
                f"marquardt::{variant}", "CUDA"
            ), variant

    def test_the_engine_too(self, cuda_build):
        assert has_kernel("marquardt::_frame_gram", "CUDA") and has_kernel("marquardt::_frame_apply", "CUDA")

    def test_versions(self, cuda_build):
        runtime, driver = gpu.versions()
        assert 12000 <= runtime < 100000 and driver >= 0
        built = gpu.architectures(str(mq._native.build_info()["cuda"]))
        assert built and all(a.major >= 8 for a in built)


@pytest.mark.errors
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    """The library has loaded; asking for a GPU names what is missing."""
    reason = backends.reasons("lm_direction", torch.device("cuda"))["cuda"]
    if gpu.versions() is None:
        assert reason == "the native library was built without CUDA kernels"
    elif gpu.versions()[1] == 0:
        assert reason == "no CUDA driver is installed"
    else:
        assert reason in ("torch sees no CUDA device", gpu.why_not_driver(*gpu.versions()))


IMPORT = """
import ctypes, os
import torch, marquardt
maps = open("/proc/self/maps").read()
assert "libcuda.so" not in maps or torch.version.cuda, "the import has looked for a driver"
from marquardt import gpu
print(gpu.versions())
x = torch.ones(2, 3)
assert torch.equal(marquardt.affine_step([x], [2.0]), 2 * x)
"""


@pytest.mark.packaging
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_loads_without_a_driver():
    """No GPU visible: import, CPU calls and the question about versions all work."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", IMPORT], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr


# --- tracing for a GPU that is not there -------------------------------------------------------------------


def shapes(fake: FakeTensorMode, pair=(torch.float32, torch.bfloat16)):
    """eps in channels_last, prev in another layout and dtype, a value per sample; all on a fake GPU."""
    with fake:
        eps = torch.empty(2, 3, 4, 5, device="cuda", dtype=pair[0]).to(memory_format=torch.channels_last)
        return eps, torch.empty(2, 3, 4, 5, device="cuda", dtype=pair[1]), torch.empty(2, device="cuda")


CALLS = {
    "lm_direction": lambda eps, prev, each: mq.lm_direction(eps, prev, damping=0.1, kappa=0.3),
    "lm_direction per sample": lambda eps, prev, each: mq.lm_direction(eps, prev, damping=0.1, kappa=each),
    "lm_direction alone": lambda eps, prev, each: mq.lm_direction(eps, damping=each, keep_norm=False),
    "lm_direction out": lambda eps, prev, each: mq.lm_direction(
        eps, prev, extrapolation=0.5, out=torch.empty_like(eps)
    ),
    "affine_step": lambda eps, prev, each: mq.affine_step([eps, prev], [0.5, each], noise_scale=0.1),
    "affine_step seeded": lambda eps, prev, each: mq.affine_step([eps], [0.5], noise_scale=each, seed=3),
}


@pytest.mark.compile
@pytest.mark.skipif(INTERPRETED, reason="the Triton interpreter cannot be traced")
@pytest.mark.filterwarnings("error::UserWarning")
class TestTracing:
    @pytest.fixture(params=CALLS, ids=list(CALLS))
    def call(self, request):
        return CALLS[request.param]

    def test_fake_tensors(self, call):
        """Shape, dtype, strides and device of the result; no warning of a slow backend, nothing remembered."""
        fake = FakeTensorMode()
        arguments = shapes(fake)
        with fake:
            out = call(*arguments)
        assert out.device == torch.device("cuda", 0) and out.dtype == torch.float32
        assert out.shape == (2, 3, 4, 5) and out.stride() == arguments[0].stride()
        if not torch.cuda.is_available():
            assert not any(backends.native_devices(name) for name in registry)

    def test_vmap(self):
        fake = FakeTensorMode()
        eps, prev, each = shapes(fake)
        with fake:
            out = torch.func.vmap(lambda e, p, k: mq.lm_direction(e, p, damping=0.1, kappa=k, batch_dims=0))(
                eps, prev, each
            )
        assert out.shape == eps.shape and out.device == eps.device

    def test_make_fx(self):
        fake = FakeTensorMode()
        eps, prev, each = shapes(fake)
        with fake:
            code = make_fx(CALLS["affine_step"])(eps, prev, each).code
        assert code.count("torch.ops.marquardt._affine_step.default") == 1

    @pytest.mark.parametrize("each", [False, True], ids=["shared", "per-sample"])
    def test_compiled_graph(self, each: bool):
        """One node per op, on the operators themselves: no formula is written out."""
        fake = FakeTensorMode()
        eps, prev, kappa = shapes(fake)
        if not each:
            with fake:
                kappa = torch.empty(())
        graphs = []

        class TracedError(Exception):
            """The graph is there; a fake GPU cannot run it."""

        def backend(graph, inputs):
            graphs.append(graph)

            def run(*args):
                raise TracedError

            return run

        @torch.compile(backend=backend, fullgraph=True)
        def step(eps, prev, kappa):
            direction = mq.lm_direction(eps, prev, damping=0.1, kappa=kappa)
            return mq.affine_step([eps, direction], [1.0, kappa], noise_scale=0.1)

        torch._dynamo.reset()
        with torch.no_grad(), pytest.raises(TracedError):
            step(eps, prev, kappa)
        (graph,) = graphs
        targets = [str(node.target) for node in graph.graph.nodes if "marquardt" in str(node.target)]
        assert targets == ["marquardt.lm_direction.default", "marquardt.affine_step.default"]

    def test_a_gpu_without_kernels_is_traced_for_what_runs(self, monkeypatch):
        """Too old a GPU without Triton: the graph is the definition, and has no operator that cannot run there."""

        def when_traced(op, index):
            return "reference"

        when_traced.__dict__["_dynamo_marked_constant"] = True
        monkeypatch.setattr(backends, "when_traced", when_traced)
        monkeypatch.setattr(registry["lm_direction"], "reference", lambda eps, *rest: torch.sin(eps))
        eps, prev, _ = shapes(FakeTensorMode())
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            raise RuntimeError("traced")

        torch._dynamo.reset()
        with torch.no_grad(), pytest.raises(Exception, match="traced"):
            torch.compile(lambda e, p: mq.lm_direction(e, p, damping=0.1, kappa=0.3), backend=backend)(
                eps, prev
            )
        torch._dynamo.reset()
        targets = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
        assert torch.sin in targets and not any("marquardt" in str(t) for t in targets)

    def test_the_choice_is_a_constant_of_the_trace(self, monkeypatch):
        """`when_traced` asks drivers and devices, which torch.compile must not look into."""
        asked = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append(1) or False)
        self.test_compiled_graph(False)
        assert asked
