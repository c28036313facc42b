"""Which backend serves a device, and that an override leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

from cotuning_kernels import backends
from cotuning_kernels.backends.registry import REGISTRY, Registry


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Two GPU backends, of which the first fails its check, and a CPU backend with a fast path."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    registry = Registry()
    registry.add("cpp", "cpu")
    registry.add("cuda", "cuda", check=lambda: dict.fromkeys((0, 1), "the driver is too old"))
    registry.add("triton", "cuda")
    registry.fast_path_loss = print  # stands in for the C++ function
    return registry


def state(registry: Registry) -> dict[str, object]:
    served = {device: registry.available(device) for device in ("cpu", "cuda", "mps")}
    reasons = {name: registry.missing_reason(name) for name in ("cpp", "cuda", "triton", "fast_path")}
    return {**served, **reasons, "loss": registry.fast_path_loss}


def test_gpus_are_checked_once_and_with_the_first_tensor(registry: Registry) -> None:
    checked: list[str] = []

    def check() -> dict[int, str]:
        checked.append("fit")
        return {}

    registry.add("fit", "cuda", check=check)
    registry.select("cpu")
    assert checked == []
    with pytest.warns(RuntimeWarning, match="runs without backend 'cuda': the driver is too old"):
        assert registry.select("cuda") == "triton"
    assert registry.select("cuda") == "triton"  # a second warning would be an error
    assert checked == ["fit"]
    assert registry.available("cuda") == ["triton", "fit", "reference"]
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot be used: the driver is too old"):
        registry.select("cuda", "cuda")


def test_one_unfit_gpu_leaves_the_backend_to_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    registry = Registry()
    registry.add("cuda", "cuda", check=lambda: {1: "the card is too old"})
    registry.add("triton", "cuda")
    with pytest.warns(RuntimeWarning, match="runs without backend 'cuda': on device 1: the card is too old"):
        assert registry.select("cuda", "auto", 0) == "cuda"
    assert registry.select("cuda", "auto", 1) == "triton"
    assert registry.select("cuda", "cuda", 0) == "cuda"
    assert registry.select("cuda", "triton", 1) == "triton"
    assert registry.select("cpu", "auto", 1) == "reference"
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot be used: the card is too old"):
        registry.select("cuda", "cuda", 1)
    with registry.override(missing={"triton": "planted"}), pytest.warns(RuntimeWarning, match="on device 1"):
        assert registry.select("cuda", "auto", 1) == "reference"
    assert registry.select("cuda", "auto", 1) == "triton"


def test_before_that_all_that_loaded_are_there(registry: Registry) -> None:
    assert registry.available("cuda") == ["cuda", "triton", "reference"]
    assert registry.select("cpu") == "cpp"
    assert registry.missing_reason("cuda") is None
    assert registry.select("mps") == "reference"


def fails_in_an_override(registry: Registry) -> None:
    with registry.override(serving={"cpu": ["triton"]}, missing={"cuda": "planted"}):
        registry.add("cuda", "mps", check=lambda: {0: "never"})
        registry.add_missing("cpp", "planted")
        assert registry.select("cpu") == "triton"
        assert registry.fast_path_loss is None
        assert registry.select("cuda") == "triton"
        assert registry.select("mps") == "cuda"
        with registry.override(missing={"triton": "planted, too"}):
            assert registry.select("cuda") == "reference"
            assert registry.available("cpu") == ["reference"]
        assert registry.available("cuda") == ["triton", "reference"]
        raise KeyboardInterrupt


def test_an_override_restores_all_that_it_changed(registry: Registry) -> None:
    before = state(registry)
    with pytest.raises(KeyboardInterrupt):
        fails_in_an_override(registry)
    assert state(registry) == before
    with pytest.warns(RuntimeWarning, match="the driver is too old"):  # the check in the block does not count
        registry.select("cuda")


def test_the_fast_path_goes_where_cpp_goes(registry: Registry) -> None:
    for change in ({"missing": {"cpp": "planted"}}, {"missing": {"fast_path": "planted"}}, {"serving": {"cpu": []}}):
        with registry.override(**change):  # type: ignore[arg-type]
            assert registry.fast_path_loss is None
        assert registry.fast_path_loss is print
    with registry.override(serving={"cpu": ["cpp", "triton"]}):
        assert registry.fast_path_loss is print


def test_the_public_functions_are_those_of_the_one_registry() -> None:
    with REGISTRY.override(serving={"cpu": ["triton"]}, missing={"cpp": "planted"}):
        assert backends.select("cpu") == "triton"
        assert backends.available("cpu") == ["triton", "reference"]
        assert backends.missing_reason("cpp") == "planted"
        assert backends.extension() is None
        assert backends.cpu_isa() is None
        assert backends.cpu_isas() == []
        with pytest.raises(RuntimeError, match="backend 'cpp', which cannot be used: planted"):
            backends.cuda_loss_plan(48, 1000)
