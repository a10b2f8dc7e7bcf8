"""Where encoders run."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import yaml

from components.settings.schema import Settings, parse_settings
from components.training.encoding.encoder_workers import (
    Placement,
    claim_slot,
    encoder_limits,
    own_device,
)

FORK = multiprocessing.get_context("fork")


def settings(root, workers: int) -> Settings:
    values = yaml.safe_load((root / "params.yaml").read_text())
    values["runtime"].update(workers=workers, engine="local", device="cpu")
    return parse_settings(values)


@pytest.mark.parametrize(
    ("workers", "pretrained", "in_stage"),
    [(1, None, True), (1, "weights/x", True), (2, None, True), (2, "weights/x", False)],
)
def test_workers_start_only_where_they_save_time(root, workers, pretrained, in_stage):
    limits = encoder_limits(settings(root, workers), pretrained)
    assert (limits is None) == in_stage
    if limits is not None:
        assert limits.workers == workers


class Worker:
    """A process that says which device is its own, and then lives until it is killed."""

    def __init__(self, folder: Path) -> None:
        ours, theirs = FORK.Pipe()
        self.process = FORK.Process(target=self._live, args=(folder, theirs), daemon=True)
        self.process.start()
        assert ours.poll(60)
        self.device = ours.recv()

    @staticmethod
    def _live(folder: Path, parent: Connection) -> None:
        device = own_device(Placement("cuda", 1, str(folder)))
        # Asked again, it is the same one.
        assert own_device(Placement("cuda", 1, str(folder))) == device
        parent.send(str(device))
        parent.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Worker]]:
    """Five on a machine with two GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    started = [Worker(tmp_path / "slots") for _ in range(5)]
    yield started
    for worker in started:
        worker.kill()


def test_neighbouring_workers_take_different_gpus_and_a_killed_one_gives_its_place_back(
    workers: list[Worker], tmp_path: Path
) -> None:
    assert [one.device for one in workers] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    with pytest.raises(RuntimeError, match="all 5 encoder slots"):
        claim_slot(tmp_path / "slots", 5)
    workers[3].kill()
    workers[3] = Worker(tmp_path / "slots")
    assert workers[3].device == "cuda:1"


@pytest.mark.parametrize(("device", "slots"), [("cpu", "slots"), ("cuda", None)])
def test_where_nothing_is_shared_no_place_is_taken(tmp_path: Path, device, slots) -> None:
    folder = None if slots is None else str(tmp_path / slots)
    assert own_device(Placement(device, 1, folder)) == torch.device(device)
    assert not list(tmp_path.iterdir())
