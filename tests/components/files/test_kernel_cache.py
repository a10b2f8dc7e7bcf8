from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import numba
import pytest

from components.files import kernel_cache

ROOT = Path(__file__).parents[3]
CODE = """
import numpy as np
from components.signals.glcm import glcm_measures
from components.signals.cooccurrence_kernels import patch_entropies
glcm_measures(np.zeros((64, 64), np.uint8))
print(sum(patch_entropies.stats.cache_hits.values()))
"""


def cache_hits(folder: str, processes: int = 1) -> int:
    """How many of these processes, started together, load the kernel."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": folder}
    environment.pop("NUMBA_CACHE_DIR", None)
    command = [sys.executable, "-c", CODE]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, cwd="/")
        for _ in range(processes)
    ]
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes
    return sum(map(int, said))


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


@pytest.mark.slow
def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    assert cache_hits(str(tmp_path), processes=3) == 2


def twice(value: int) -> int:
    return 2 * value


def test_a_kernel_is_one_by_its_own_source_and_that_of_the_kernels_beside_it(
    tmp_path: Path,
) -> None:
    def stamp(name: str = "cooccurrence_kernels.py", clone: str = "one") -> str:
        source = str(tmp_path / clone / name)
        return kernel_cache.ContentLocator(twice, source).get_source_stamp()

    for clone in ("one", "two"):
        (tmp_path / clone).mkdir()
        for name in ("cooccurrence_kernels.py", "histogram_kernels.py", "glcm.py"):
            (tmp_path / clone / name).write_text("one = 1\n")
    first = stamp()
    # A clone at another place has the same one; another file of the same content has not.
    assert stamp(clone="two") == first
    assert stamp("histogram_kernels.py") != first
    (tmp_path / "one" / "glcm.py").write_text("two = 2\n")
    assert stamp() == first
    # Its functions may be compiled into the kernel.
    (tmp_path / "one" / "histogram_kernels.py").write_text("two = 2\n")
    assert stamp() != first


def test_a_compiler_that_stands_still_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kernel_cache, "_COMPILES_S", 0.3)
    kernel = kernel_cache.cached(numba.njit(twice))
    lock = Path(kernel.stats.cache_path) / "twice.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        begun = time.monotonic()
        assert kernel(3) == 6
        assert time.monotonic() - begun > 0.25
    # What was compiled without the lock is kept all the same, and nobody holds it afterwards.
    again = kernel_cache.cached(numba.njit(twice))
    assert again(4) == 8
    assert sum(again.stats.cache_hits.values()) == 1
    assert again(1.5) == 3.0
    # A kernel that cannot be compiled keeps nobody waiting, itself neither.
    monkeypatch.setattr(kernel_cache, "_COMPILES_S", 60.0)
    begun = time.monotonic()
    for _ in range(2):
        with pytest.raises(numba.TypingError):
            again(None)
    assert again(2j) == 4j
    assert time.monotonic() - begun < 30
    with lock.open("w") as free:
        fcntl.flock(free, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write")
def test_without_a_writable_folder_kernels_are_compiled_all_the_same() -> None:
    assert cache_hits("/proc/nowhere") == 0
