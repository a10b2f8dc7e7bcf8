from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from components.images import scratch
from components.images.decoding import decode_rgb, read_rgb
from components.images.scratch import Scratch
from components.signals.candidate import Candidate, measure_candidate

SAMPLE = Path(__file__).parents[3] / "data" / "sample"


def test_memory_is_used_again_and_grows() -> None:
    memory = Scratch()
    large = memory.take("rgb", (100, 200, 3))
    assert large.shape == (100, 200, 3)
    assert np.shares_memory(large, memory.take("rgb", (10, 20, 3)))
    assert not np.shares_memory(large, memory.take("gray", (10, 20)))
    larger = memory.take("rgb", (200, 200, 3))
    assert not np.shares_memory(large, larger)
    assert np.shares_memory(larger, memory.take("rgb", (100, 200, 3)))


def test_a_giant_gets_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_KEPT_BYTES", 1000)
    memory = Scratch()
    assert not np.shares_memory(memory.take("rgb", (1001,)), memory.take("rgb", (1001,)))


def test_a_second_thread_is_refused() -> None:
    memory = Scratch()
    memory.take("rgb", (1,))
    problems: list[str] = []

    def use() -> None:
        try:
            memory.take("rgb", (1,))
        except RuntimeError as problem:
            problems.append(str(problem))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert problems == ["scratch memory is used by a second thread; give each its own"]


def test_a_decode_into_scratch_memory_gives_the_same_pixels_and_the_next_overwrites_them() -> None:
    memory = Scratch()
    first, second = SAMPLE / "galen-crout-175291.jpg", SAMPLE / "ng-32703.jpg"
    decoded = decode_rgb(first.read_bytes(), scratch=memory).pixels
    np.testing.assert_array_equal(decoded, read_rgb(first).pixels)
    following = decode_rgb(second.read_bytes(), scratch=memory).pixels
    np.testing.assert_array_equal(following, read_rgb(second).pixels)


def test_threads_measure_candidates_side_by_side() -> None:
    names = ["galen-crout-175291.jpg", "ng-32703.jpg"]
    candidates = [Candidate(SAMPLE / name, 240, 800.0, 64, 400.0, glcm=False) for name in names]
    alone = [measure_candidate(candidate) for candidate in candidates]
    rows: list[dict[str, object]] = [{}, {}]

    def measure(index: int) -> None:
        for _ in range(2):
            rows[index] = measure_candidate(candidates[index])

    threads = [threading.Thread(target=measure, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rows == alone
