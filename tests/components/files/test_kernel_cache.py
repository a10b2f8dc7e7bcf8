from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CODE = """
import numpy as np
from components.signals.glcm import glcm_measures
from components.signals.cooccurrence_kernels import patch_entropies
glcm_measures(np.zeros((64, 64), np.uint8))
print(sum(patch_entropies.stats.cache_hits.values()))
"""


def cache_hits(folder: str) -> int:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": folder}
    environment.pop("NUMBA_CACHE_DIR", None)
    answer = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, check=True, cwd="/"
    )
    return int(answer.stdout)


def test_a_second_process_loads_what_the_first_compiled_even_after_a_fresh_checkout(
    tmp_path: Path,
) -> None:
    source = ROOT / "components" / "signals" / "cooccurrence_kernels.py"
    times = source.stat()
    assert cache_hits(str(tmp_path)) == 0
    os.utime(source, (time.time(), time.time()))
    try:
        assert cache_hits(str(tmp_path)) == 1
    finally:
        os.utime(source, (times.st_atime, times.st_mtime))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write")
def test_without_a_writable_folder_kernels_are_compiled_all_the_same() -> None:
    assert cache_hits("/proc/nowhere") == 0
