"""Names of systems beside names of their parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.evaluation.measuring.evaluation_run import OpenedMetrics, RunOptions
from components.evaluation.measuring.ledger import Ledger
from components.evaluation.suites.suite_scores import clashing_name, evaluate_suite
from components.evaluation.suites.suites import Suite, SuiteItem
from components.evaluation.suites.systems import FolderSystem

SIZES = {"96x96", "96x64"}


def test_a_name_under_which_another_systems_part_stands_is_refused_before_painting(
    tmp_path: Path,
) -> None:
    items = tuple(SuiteItem(size, "", 96, 96, 0, stratum=size) for size in sorted(SIZES))
    with pytest.raises(ValueError, match=r"--system ours\.96x96: .* ours for 96x96 are called"):
        evaluate_suite(
            Suite("sizes", "", "sizes/v1", (), items),
            [FolderSystem(name, tmp_path) for name in ("ours.96x96", "ours")],
            OpenedMetrics((), {}),
            (),
            ledger=Ledger(tmp_path / "ledger"),
            options=RunOptions(tmp_path),
            out_dir=tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "strata"),
    [
        (["ours", "ours.v2"], SIZES),
        (["ours.96x96", "theirs"], SIZES),
        # One stratum has no numbers of its own.
        (["ours", "ours.96x96"], {"96x96"}),
    ],
)
def test_other_names_with_dots_stay(names: list[str], strata: set[str]) -> None:
    assert clashing_name(names, strata) == ""
