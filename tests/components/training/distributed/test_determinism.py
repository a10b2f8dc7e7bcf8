"""What `runtime.determinism` sets in torch, what it refuses, and what a run says of it."""

from __future__ import annotations

import pytest
import torch
import yaml

from components.settings.runtime import RuntimeSettings
from components.training.distributed.ranks import (
    NotDeterministic,
    described_determinism,
    deterministic_torch,
)


def torch_state() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.mark.parametrize("has_gpu", [False, True])
def test_bitwise_is_strict_on_every_device_and_fills_no_buffers(monkeypatch, has_gpu):
    # What a machine with a GPU answers; told to warn only, torch takes the other attention kernels.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    before = torch_state()
    with deterministic_torch(1):
        assert torch_state() == (True, False, False)
    with deterministic_torch(1, "fast"):
        assert torch_state() == (False, False, False)
    assert torch_state() == before


def test_what_was_set_before_comes_back():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic_torch(1):
            pass
        assert torch_state() == (True, True, True)
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_operation_without_a_deterministic_kernel_is_an_error_that_names_the_setting():
    values = torch.zeros(4)
    place = torch.tensor([0, 0])

    def scatter() -> None:
        values.put_(place, torch.tensor([1.0, 2.0]), accumulate=False)

    with (
        pytest.raises(NotDeterministic, match=r"put_.*set runtime\.determinism to fast"),
        deterministic_torch(1),
    ):
        scatter()
    with deterministic_torch(1, "fast"):
        scatter()
    with pytest.raises(RuntimeError, match="another"), deterministic_torch(1):
        raise RuntimeError("another")


def test_a_run_says_what_it_promises_and_where_that_was_tested(root):
    values = yaml.safe_load((root / "params.yaml").read_text())["runtime"]
    runtime = RuntimeSettings.model_validate(values)
    said = {
        (how, device): described_determinism(
            runtime.model_copy(update={"determinism": how, "device": device})
        )
        for how in ("bitwise", "fast")
        for device in ("cpu", "cuda")
    }
    assert "tested on CPU" in said["bitwise", "cpu"]
    assert "not measured on CUDA" in said["bitwise", "cuda"]
    assert said["fast", "cpu"] == said["fast", "cuda"]
    assert "bytes" not in said["fast", "cpu"]
