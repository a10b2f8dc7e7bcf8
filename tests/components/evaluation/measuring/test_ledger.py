"""The ledger: content-addressed, append-only, safe against kills and many writers."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.evaluation.measuring.ledger import (
    FeatureKey,
    Ledger,
    LedgerConflict,
    LedgerDamaged,
    ValueKey,
)


def key(image: str, metric: str = "entropy_bits") -> ValueKey:
    return ValueKey(image, "", "", metric, "v1", "")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*.parquet"))
    }


def test_what_was_appended_is_found_and_nothing_else(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    values = {key("a"): 1.5, key("b"): None, key("c"): math.inf}
    ledger.append(values)
    assert Ledger(tmp_path).find([*values, key("d")]) == values


def test_an_empty_ledger_finds_nothing_and_has_an_empty_table(tmp_path: Path) -> None:
    assert Ledger(tmp_path / "none").find([key("a")]) == {}
    assert Ledger(tmp_path / "none").table().num_rows == 0


@settings(max_examples=15)
@given(
    values=st.dictionaries(
        st.text("abcdef", min_size=1, max_size=4),
        st.none() | st.floats(allow_nan=False),
        min_size=1,
        max_size=6,
    ),
    data=st.data(),
)
def test_the_bytes_after_compaction_depend_on_the_values_alone(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, float | None], data: st.DataObject
) -> None:
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    # At least two appends each: a single part is in its final form anyway only when it is sorted.
    ordered = data.draw(st.permutations(sorted(values)))
    for name in ordered:
        Ledger(first).append({key(name): values[name]})
    Ledger(second).append({key(name): values[name] for name in reversed(ordered)})
    Ledger(second).append({key(ordered[0]): values[ordered[0]]})
    for folder in (first, second):
        Ledger(folder).compact()
    assert contents(first) == contents(second)
    assert len(contents(first)) == 1
    assert Ledger(first).table().equals(Ledger(second).table())


def test_a_key_with_two_values_is_an_error_that_names_both_files(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append({key("a"): 1.0})
    ledger.append({key("a"): 1.0, key("b"): 2.0})
    assert ledger.find([key("a")]) == {key("a"): 1.0}
    ledger.append({key("a"): 1.0000000000000002})
    with pytest.raises(LedgerConflict) as caught:
        ledger.find([key("a")])
    message = str(caught.value)
    assert "1.0 " in message
    assert "1.0000000000000002" in message
    assert message.count("part-") == 2
    with pytest.raises(LedgerConflict):
        ledger.compact()


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append({key("a"): 1.0})
    (part,) = tmp_path.rglob("part-*.parquet")
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(LedgerDamaged, match=part.name):
        ledger.find([key("a")])


def test_features_come_back_bit_for_bit_before_and_after_compaction(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ledger = Ledger(tmp_path)
    blocks = {
        FeatureKey(name, "inception/v1", "w"): rng.standard_normal((rows, 5)).astype(np.float32)
        for name, rows in (("a", 1), ("b", 3), ("c", 0))
    }
    for name, block in blocks.items():
        ledger.append_features({name: block})
    missing = FeatureKey("a", "inception/v1", "other weights")
    assert ledger.known_features([*blocks, missing]) == set(blocks)
    for _ in range(2):
        found = ledger.find_features([*blocks, missing])
        assert found.keys() == blocks.keys()
        for name, block in blocks.items():
            assert found[name].tobytes() == block.tobytes()
            assert found[name].shape == block.shape
        ledger.compact()
    assert len(contents(tmp_path)) == 1


def test_features_of_another_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"float32 \(k, d\)"):
        Ledger(tmp_path).append_features({FeatureKey("a", "f", ""): np.zeros(3, np.float32)})


WRITER = """
import sys
from pathlib import Path
from components.evaluation.measuring.ledger import Ledger, ValueKey
ledger, first = Ledger(Path(sys.argv[1])), int(sys.argv[2])
for number in range(first, first + 12):
    ledger.append({ValueKey(f"{number:04}", "", "", "m", "v1", ""): number / 7})
    if number % 4 == 0:
        ledger.compact()
"""


def test_many_processes_append_and_compact_at_once(tmp_path: Path, root: Path) -> None:
    # Overlapping ranges: the same keys come from two writers, and agree.
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(first)], cwd=root)
        for first in (0, 6)
    ]
    assert [writer.wait(timeout=100) for writer in writers] == [0, 0]
    table = Ledger(tmp_path).table()
    assert table["value"].to_pylist() == [number / 7 for number in range(18)]


KILLED = """
import itertools, sys
from pathlib import Path
from components.evaluation.measuring.ledger import Ledger, ValueKey
ledger = Ledger(Path(sys.argv[1]))
for number in itertools.count():
    ledger.append({ValueKey(f"{number:06}", "", "", "m", "v1", ""): float(number)})
    print(number, flush=True)
    if number % 3 == 0:
        ledger.compact()
"""


def test_a_killed_writer_loses_nothing_that_append_had_returned_from(
    tmp_path: Path, root: Path
) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    for _ in range(5):
        writer.stdout.readline()
    # Into the middle of one append or another.
    time.sleep(0.02)
    os.kill(writer.pid, signal.SIGKILL)
    said = [int(line) for line in writer.stdout.read().splitlines() if line.isdigit()]
    writer.wait()
    values = Ledger(tmp_path).table()["value"].to_pylist()
    assert values == [float(number) for number in range(len(values))]
    assert len(values) >= max(said, default=4) + 1
    Ledger(tmp_path).compact()
    assert [path.name for path in (tmp_path / "values").glob(".part-*")] == []
