"""What four real processes tell each other."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from components.training.distributed.ranks import Ranks


def _meet(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 4)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4)
    found = {}
    for degree in (1, 2, 4):
        beats: list[int] = []
        ranks = Ranks(
            rank, 4, torch.device("cpu"), lambda beats=beats: beats.append(1), context_degree=degree
        )
        # Two rows (such as t and the loss) of three samples; ranks of a group have the same.
        samples = torch.arange(3) + 3.0 * ranks.data_rank
        found[degree] = {
            "samples": ranks.gather_samples(torch.stack([samples, 100 + samples])),
            "gathered": ranks.gather(rank),
            "any": ranks.any(rank == 2, False),
            "beats": len(beats),
        }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_every_rank_gets_each_sample_once_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_meet, args=(rank, str(tmp_path))) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for rank in range(4):
        found = torch.load(tmp_path / f"{rank}.pt")
        for degree, told in found.items():
            samples = torch.arange(12.0 / degree)
            assert torch.equal(told["samples"], torch.stack([samples, 100 + samples]))
            assert told["gathered"] == [0, 1, 2, 3]
            assert told["any"] == (True, False)
            assert told["beats"] == 3
