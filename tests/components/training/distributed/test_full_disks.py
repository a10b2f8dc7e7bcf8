"""A disk that is full when results are written: one line, and nothing half written is left."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from components.files.whole_files import whole_folder
from components.training.distributed.checkpoints import DiskFull, full_disks_named
from components.training.dit.worker import LASTING as LASTING_OF_DIT
from components.training.vae.worker import LASTING


def test_a_disk_that_is_full_at_the_end_is_no_reason_to_try_again(tmp_path: Path) -> None:
    assert issubclass(DiskFull, LASTING)
    assert issubclass(DiskFull, LASTING_OF_DIT)
    for code, name, kind, said in (
        (errno.ENOSPC, "data/vae/crops.png", DiskFull, r"^data/vae/crops\.png: No space left"),
        (errno.EDQUOT, None, DiskFull, f"^{tmp_path}: Disk quota exceeded; make room"),
        (errno.EIO, "data/vae/crops.png", OSError, "Input/output error"),
    ):
        with pytest.raises(kind, match=said), full_disks_named(tmp_path):
            raise OSError(code, os.strerror(code), name)


def test_weights_that_do_not_fit_on_the_disk_are_named_like_any_other_file(tmp_path: Path) -> None:
    """safetensors writes outside Python, and its error is none of the system's."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            with full_disks_named(tmp_path), whole_folder(tmp_path / "raw") as folder:
                save_file({"w": torch.zeros(9000)}, folder / "w.safetensors")
        except DiskFull as problem:
            said = str(problem) == f"{tmp_path}: File too large; make room and run again"
            os._exit(0 if said and not list(tmp_path.iterdir()) else 1)
        os._exit(2)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(120)
    assert child.exitcode == 0
