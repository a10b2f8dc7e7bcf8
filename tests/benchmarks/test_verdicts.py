"""Targets of benchmarks: what counts as missed, and that the pages say what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import bench
import pytest
from verdicts import RESULTS, Verdict, conclude


@pytest.mark.parametrize(
    ("values", "at_most", "outcome"),
    [
        ((1.0, 1.25, 1.25), True, "kept"),
        ((1.2, 1.3, 1.4), True, "undecided"),
        ((1.26, 1.3, 1.4), True, "missed"),
        ((1.25, 1.3, 1.2), False, "kept"),
        ((1.2, 1.2, 1.3), False, "undecided"),
        ((1.2, 1.2, 1.24), False, "missed"),
    ],
)
def test_a_target_is_missed_when_every_round_is_beyond_it(
    values: tuple[float, ...], at_most: bool, outcome: str
) -> None:
    assert Verdict("a", values, 1.25, at_most).outcome == outcome


def test_one_missed_target_is_exit_code_1_and_all_are_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(RESULTS, str(tmp_path / "found.jsonl"))
    kept, missed = Verdict("kept", (1.0, 3.0, 2.0), 2.0), Verdict("missed", (3.0,), 2.0)
    assert conclude([kept]) == 0
    assert conclude([kept, missed]) == 1
    assert "missed: 3 (3 to 3, n = 1); target at most 2: missed" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [row["outcome"] for row in rows] == ["kept", "kept", "missed"]
    assert (rows[0]["median"], rows[0]["low"], rows[0]["high"]) == (2.0, 1.0, 3.0)


def test_the_page_is_of_the_last_results_and_every_benchmark_has_one(root: Path) -> None:
    results = json.loads((root / "benchmarks" / "results.json").read_text(encoding="utf-8"))
    page = (root / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page == bench.table(results)
    assert {row["benchmark"] for row in results["verdicts"]} == set(bench.SHORT)
    for command in bench.SHORT.values():
        assert (root / "benchmarks" / command.split()[0]).is_file()


def test_no_page_repeats_a_ratio_that_make_bench_measures(root: Path) -> None:
    """Figures of these benchmarks stand on one page, which is written from the results."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    scripts = {command.split()[0] for command in bench.SHORT.values()}
    claims = [line for line in readme.splitlines() if any(s in line for s in scripts)]
    assert claims == []
    assert "docs/benchmarks.md" in readme
