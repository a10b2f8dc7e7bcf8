"""Locks of devices between real processes; the number of devices is set, no GPU is needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.running.gpu_lock import (
    COUNT_VARIABLE,
    LOCKS_VARIABLE,
    VISIBLE,
    Gpu,
    GpusMissing,
    gpus_for,
    machine_gpus,
    parse_query,
)

HOLDER = """
import os, sys, time
from flows.running.gpu_lock import gpus_for
with gpus_for("holder", int(sys.argv[1])) as held:
    print(",".join(held), os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
    time.sleep(600)
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def with_gpus(count: int) -> None:
        monkeypatch.setenv(COUNT_VARIABLE, str(count))

    monkeypatch.setenv(LOCKS_VARIABLE, str(tmp_path / "locks"))
    monkeypatch.delenv(VISIBLE, raising=False)
    return with_gpus


def hold(root: Path, count: int) -> tuple[subprocess.Popen[str], str]:
    """A process that holds `count` devices, and which."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(count)], cwd=root, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().split()[0]


def test_two_processes_never_hold_one_device_and_a_kill_gives_it_back(
    machine: Callable[[int], None], root: Path
) -> None:
    machine(3)
    first, held_first = hold(root, 1)
    second, held_second = hold(root, 2)
    try:
        assert sorted([*held_first.split(","), *held_second.split(",")]) == ["0", "1", "2"]
        with pytest.raises(GpusMissing, match="no 1 GPU came free within 0 minutes"):
            gpus_for("third", 1, wait_s=0).__enter__()
        second.send_signal(signal.SIGKILL)
        second.wait()
        with gpus_for("third", 2, wait_s=60) as held:
            assert ",".join(held) == held_second
            assert os.environ[VISIBLE] == held_second
        assert VISIBLE not in os.environ
    finally:
        for process in (first, second):
            process.kill()
            process.wait()


def test_a_waiting_stage_says_so_and_starts_when_the_holder_ends(
    machine: Callable[[int], None], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(1)
    waiting = tmp_path / "waiting"
    monkeypatch.setenv("ULTRAFLUX_GPU_WAITING", str(waiting))
    holder, _ = hold(root, 1)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        holder.kill()

    with gpus_for("vae", 1, say=say) as held:
        assert held == ("0",)
        assert not waiting.exists()
    holder.wait()
    assert said == ["vae: waiting for 1 GPU, others hold them"]


def test_a_stage_that_cannot_get_all_devices_keeps_none(
    machine: Callable[[int], None], root: Path
) -> None:
    machine(2)
    holder, held = hold(root, 1)
    try:
        with pytest.raises(GpusMissing, match="no 2 GPUs"):
            gpus_for("dit_stage1", 2, wait_s=0.5, say=lambda line: None).__enter__()
        other, left = hold(root, 1)
        other.kill()
        other.wait()
        # Not the first word of a line that says that it waits.
        assert (held, left) == ("0", "1")
    finally:
        holder.kill()
        holder.wait()


def test_a_stage_without_gpus_runs_at_once_and_one_with_too_many_fails_at_once(
    machine: Callable[[int], None],
) -> None:
    machine(0)
    with gpus_for("select", 0) as held:
        assert held == ()
    begun = time.monotonic()
    with pytest.raises(GpusMissing) as problem:
        gpus_for("dit_stage1", 1).__enter__()
    assert time.monotonic() - begun < 60
    assert str(problem.value).startswith("dit_stage1: needs 1 GPU, this machine has none to use")
    assert "\n" not in str(problem.value)


def test_a_number_that_is_none_is_named(
    machine: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(COUNT_VARIABLE, "many")
    with pytest.raises(GpusMissing, match="ULTRAFLUX_GPU_COUNT = many"):
        machine_gpus()


def test_devices_hidden_from_this_process_are_not_taken(
    machine: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(4)
    monkeypatch.setenv(VISIBLE, "1, 3")
    assert [gpu.index for gpu in machine_gpus()] == ["1", "3"]
    with gpus_for("vae", 2) as held:
        assert held == ("1", "3")
    assert os.environ[VISIBLE] == "1, 3"


def driver(folder: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> Path:
    """An `nvidia-smi` that says this, first in PATH."""
    monkeypatch.delenv(COUNT_VARIABLE, raising=False)
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nprintf '{said}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return program


def test_a_scheduler_may_name_devices_as_the_driver_does(
    machine: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tenth of the second is used: as much as is allowed.
    driver(tmp_path, monkeypatch, "0, GPU-a, 1000, 0\\n1, GPU-b, 1000, 100\\n")
    monkeypatch.setenv(VISIBLE, "GPU-b")
    assert [gpu.identity for gpu in machine_gpus()] == ["GPU-b"]
    with gpus_for("vae", 1, wait_s=0) as held:
        assert held == ("1",)
    assert os.environ[VISIBLE] == "GPU-b"


def test_the_drivers_answer_is_read() -> None:
    text = "0, GPU-aaaa, 81559, 4\n1, GPU-bbbb, 81559, 40779\n2, GPU-cccc, [N/A], [N/A]\n"
    devices = parse_query(text)
    assert [gpu.identity for gpu in devices] == ["GPU-aaaa", "GPU-bbbb", "GPU-cccc"]
    assert devices[0].free_fraction == pytest.approx(1 - 4 / 81559)
    assert devices[1].free_fraction == pytest.approx(0.5, abs=1e-4)
    assert devices[2] == Gpu("2", "GPU-cccc", None)


def test_a_device_that_somebody_uses_without_the_lock_is_passed_over(
    machine: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "0, GPU-a, 1000, 600\\n1, GPU-b, 1000, 10\\n"
    program = driver(tmp_path, monkeypatch, said)
    with gpus_for("vae", 1) as held:
        assert held == ("1",)
    with pytest.raises(GpusMissing):
        gpus_for("vae", 2, wait_s=0).__enter__()
    program.write_text("#!/bin/sh\necho NVML: driver mismatch; exit 9\n")
    with pytest.raises(GpusMissing, match="nvidia-smi: NVML: driver mismatch"):
        machine_gpus()
