"""On which GPUs and drivers the CUDA kernels run, and what is said where they do not: rules that need no GPU."""

from __future__ import annotations

import pytest
import torch

import marquardt as mq
from harness import INTERPRETED
from marquardt import backends, gpu

pytestmark = [
    pytest.mark.errors,
    pytest.mark.skipif(INTERPRETED, reason="these tests choose the backend"),
]

RELEASE = "80-real 90-real 100-real 80-virtual 100-virtual"
CUDA = torch.device("cuda", 0)


def why_not(built: str, chip: tuple[int, int]) -> str | None:
    return gpu.why_not_architecture(gpu.architectures(built), chip)


class TestArchitectures:
    def test_names(self):
        found = gpu.architectures("80-real 90a-real 100f-virtual 120")
        assert [a.name for a in found] == ["sm_80", "sm_90a", "compute_100f", "sm_120"]
        assert [(a.sass, a.ptx) for a in found] == [(True, False), (True, False), (False, True), (True, True)]
        assert gpu.architectures("none") == [] == gpu.architectures("")

    @pytest.mark.parametrize("chip", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (13, 1)])
    def test_the_release_serves(self, chip):
        assert why_not(RELEASE, chip) is None

    @pytest.mark.parametrize("chip", [(6, 1), (7, 0), (7, 5)])
    def test_the_release_is_too_new_for(self, chip):
        message = why_not(RELEASE, chip)
        assert message == f"built for sm_80, sm_90, sm_100; this GPU is sm_{chip[0]}{chip[1]}"

    def test_machine_code_serves_one_major_version(self):
        """And there the same minor version or a later one."""
        assert why_not("86-real", (8, 6)) is None and why_not("86-real", (8, 9)) is None
        assert why_not("86-real", (8, 0)) == "built for sm_86; this GPU is sm_80"
        assert why_not("80-real", (9, 0)) == "built for sm_80; this GPU is sm_90"

    def test_ptx_serves_what_is_newer(self):
        for chip in ((8, 0), (9, 0), (12, 1)):
            assert why_not("80-virtual", chip) is None
        assert why_not("80-virtual", (7, 5)) == "built for compute_80; this GPU is sm_75"

    def test_code_for_one_chip_or_family(self):
        assert why_not("90a-real", (9, 0)) is None and why_not("90a-virtual", (9, 0)) is None
        assert why_not("90a-real 90a-virtual", (10, 0)) == "built for sm_90a; this GPU is sm_100"
        assert why_not("100f-real", (10, 3)) is None and why_not("100f-virtual", (10, 3)) is None
        assert why_not("100f-virtual", (12, 0)) is not None


class TestDrivers:
    @pytest.mark.parametrize("driver", [13000, 13020, 14000])
    def test_new_enough(self, driver):
        assert gpu.why_not_driver(13000, driver) is None

    def test_old(self):
        assert gpu.why_not_driver(13000, 12040) == "driver supports CUDA 12.4, the kernels need 13.0"

    def test_minor_versions_are_compatible(self):
        """For machine code; the driver reads PTX up to its own version only."""
        assert gpu.why_not_driver(13020, 13000) is None
        assert (
            gpu.why_not_driver(13020, 13000, from_ptx=True)
            == "driver supports CUDA 13.0, the kernels need 13.2"
        )

    def test_none(self):
        assert gpu.why_not_driver(13000, 0) == "no CUDA driver is installed"


@pytest.fixture
def machine(monkeypatch):
    """machine(versions, archs, chip): a build and a GPU of the test's choice."""

    def pretend(versions, archs=RELEASE, chip=None):
        monkeypatch.setattr(gpu, "versions", lambda: versions)
        monkeypatch.setattr(gpu._native, "build_info", lambda: {"cuda": archs})
        monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: chip is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: chip)
        backends.forget()

    yield pretend
    backends.forget()


class TestReasons:
    def reason(self) -> str | None:
        return backends.reasons("lm_direction", CUDA)["cuda"]

    def test_each_has_its_own(self, machine):
        machine(None)
        assert self.reason() == "the native library was built without CUDA kernels"
        machine((13000, 0))
        assert self.reason() == "no CUDA driver is installed"
        machine((13000, 12040), chip=(9, 0))
        assert self.reason() == "driver supports CUDA 12.4, the kernels need 13.0"
        machine((13000, 13000))
        assert self.reason() == "torch sees no CUDA device"
        machine((13000, 13000), chip=(7, 5))
        assert self.reason() == "built for sm_80, sm_90, sm_100; this GPU is sm_75"
        machine((13020, 13000), chip=(12, 0))
        assert self.reason() == "driver supports CUDA 13.0, the kernels need 13.2"
        machine((13020, 13000), chip=(9, 0))
        assert self.reason() is None

    def test_no_kernel_of_the_op(self, machine, monkeypatch):
        machine((13000, 13000), chip=(9, 0))
        monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
        assert self.reason() == "this build has no CUDA kernel of lm_direction"

    def test_data_elsewhere(self):
        assert backends.reasons("lm_direction", torch.device("cpu"))["cuda"] == "the data is on cpu"


class Data:
    """As much of a CUDA tensor as the choice of a backend looks at."""

    device = CUDA


class TestChoice:
    @pytest.fixture(autouse=True)
    def _auto(self):
        with mq.use_backend("auto"):
            yield

    def able(self, monkeypatch, *names: str) -> None:
        for name in ("cuda", "triton", "cpu"):
            reason = None if name in names else f"no {name} here"
            monkeypatch.setitem(backends._WHY_NOT, name, lambda op, device, reason=reason: reason)
        backends.forget()

    def test_order_on_a_gpu(self, monkeypatch):
        for names, first in ((("triton", "cuda"), "cuda"), (("triton",), "triton")):
            self.able(monkeypatch, *names)
            assert backends.choose("lm_direction", Data()) == first
        self.able(monkeypatch)
        monkeypatch.setattr(backends, "_warned", set())
        with pytest.warns(
            UserWarning, match="runs as plain PyTorch on cuda .*no cuda here; .*no triton here"
        ):
            assert backends.choose("lm_direction", Data()) == "reference"
        backends.forget()

    def test_asked_once_for_a_device(self, monkeypatch):
        self.able(monkeypatch, "cuda")
        asked = []
        monkeypatch.setitem(backends._WHY_NOT, "cuda", lambda op, device: asked.append(device))
        for _ in range(3):
            assert backends.choose("lm_direction", Data()) == "cuda"
        assert asked == [CUDA] and CUDA in backends.native_devices("lm_direction")
        backends.forget()
        assert not backends.native_devices("lm_direction")

    def test_forced_where_it_cannot_run(self, machine):
        """Every backend's reason, and nothing remembered."""
        machine((13000, 13000), chip=(7, 5))
        with mq.use_backend("cuda"), pytest.raises(NotImplementedError) as raised:
            backends.choose("affine_step", Data())
        for words in (
            "affine_step: backend must be one that can run, got 'cuda' on cuda:0",
            "cuda: built for sm_80, sm_90, sm_100; this GPU is sm_75",
            "cpu: the data is on cuda",
            "reference: can run",
        ):
            assert words in str(raised.value)

    def test_traced_for_a_gpu(self, monkeypatch):
        """Without a GPU the operator itself is recorded, else what `auto` takes there."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert backends.when_traced("lm_direction", 0) == "cuda"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        self.able(monkeypatch, "triton")
        assert backends.when_traced("lm_direction", 0) == "triton"
        self.able(monkeypatch)
        assert backends.when_traced("lm_direction", 0) == "reference"
        backends.forget()


def test_report_names_the_versions(machine):
    from marquardt import env

    machine((13000, 12040), chip=None)
    report = env.report()
    assert "kernels 13.0, driver 12.4" in report
    assert "driver supports CUDA 12.4, the kernels need 13.0" in report
    machine((13000, 0))
    assert "kernels 13.0, driver not installed" in env.report()
    machine(None)
    assert "no kernels in this build" in env.report()
