"""Two folders as one evaluation: systems renamed where they must be, and what does not compare."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from components.evaluation.measuring.evaluation_lock import EvaluationLock
from components.evaluation.pages.evaluation_files import EvaluationIncomplete
from components.evaluation.pages.merged_evaluation import read_together
from components.evaluation.pages.suite_report import ReportOptions, build_suite_report
from components.evaluation.suites.runtime_suite import Timing, write_runtime
from components.evaluation.suites.suite_scores import headline

LOCK = EvaluationLock(
    "reconstruction",
    "reconstruction-4096/v1",
    "1" * 64,
    {"psnr_db": {"protocol": "psnr/rgb8/v1", "weights": ""}},
    {"steps": 50},
    "c" * 64,
)


def copied(
    evaluation: Path, name: str, change: Callable[[pd.DataFrame], pd.DataFrame] = lambda t: t
) -> Path:
    """The same evaluation under another name beside it, its table changed."""
    folder = evaluation.parent / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(evaluation, folder)
    table = change(pd.read_parquet(folder / "scores.parquet"))
    table.to_parquet(folder / "scores.parquet", index=False)
    described = json.loads((folder / "metrics.json").read_text())
    described["metrics"] = headline(table, resamples=200, seed=0)
    (folder / "metrics.json").write_text(json.dumps(described))
    return folder


def lock(folder: Path, **changed: Any) -> None:
    (folder / "evaluation.lock.json").write_text(json.dumps(asdict(LOCK) | changed))


def test_systems_of_one_name_are_told_apart_and_compared(evaluation: Path) -> None:
    later = copied(evaluation, "later", lambda t: t.assign(value=t["value"] + 2.0))
    merged = read_together((evaluation, later))
    assert merged.systems == (
        *("base@evaluation", "mine@evaluation"),
        *("base@later", "mine@later"),
    )
    assert merged.metrics["mine@later.psnr_db"] == pytest.approx(34.0)
    assert merged.metrics["mine@evaluation.psnr_db"] == pytest.approx(32.0)
    assert any("without a lock" in note for note in merged.notes)
    options = ReportOptions(resamples=500, baseline="mine@evaluation", further=(later,))
    made = build_suite_report(evaluation, evaluation.parent, options)
    (sentence,) = (line for line in made.verdicts if line.startswith("mine@later"))
    assert sentence == (
        "mine@later against mine@evaluation over 8 prompts: better in PSNR, SSIM, at 5% over the "
        "whole page."
    )
    assert sentence in made.html


def test_a_name_that_begins_another_keeps_its_own_numbers(evaluation: Path) -> None:
    def renamed(table: pd.DataFrame) -> pd.DataFrame:
        return table.assign(system=table["system"].replace({"mine": "base.v2"}))

    first = copied(evaluation, "first", renamed)
    path = first / "pictures.jsonl"
    path.write_text(path.read_text().replace('"system": "mine"', '"system": "base.v2"'))
    merged = read_together((first, copied(evaluation, "second")))
    assert set(merged.systems) == {"base@first", "base.v2", "base@second", "mine"}
    assert merged.metrics["base.v2.psnr_db"] == pytest.approx(32.0)
    assert merged.metrics["base@first.psnr_db"] == merged.metrics["base@second.psnr_db"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"suite": "other"}, "suite other, was reconstruction"),
        ({"items": "0" * 64}, "items "),
        ({"metrics": {"psnr_db": {"protocol": "psnr/v0", "weights": ""}}}, "protocol of psnr_db"),
        (
            {"metrics": {"psnr_db": {"protocol": "psnr/rgb8/v1", "weights": "ab"}}},
            "weights of psnr_db",
        ),
    ],
)
def test_what_does_not_compare_is_refused(
    evaluation: Path, changed: dict[str, Any], message: str
) -> None:
    one, two = copied(evaluation, "one"), copied(evaluation, "two")
    lock(one)
    lock(two, **changed)
    with pytest.raises(EvaluationIncomplete, match="does not compare with") as refused:
        read_together((one, two))
    assert message in str(refused.value)


def test_a_part_that_was_decided_does_not_compare_with_the_whole(evaluation: Path) -> None:
    one, two = copied(evaluation, "one"), copied(evaluation, "two")
    lock(one)
    lock(two)
    described = json.loads((one / "metrics.json").read_text())
    described["protocol"] += "+drawn8of40"
    (one / "metrics.json").write_text(json.dumps(described))
    with pytest.raises(EvaluationIncomplete, match=r"was reconstruction \(\S+\+drawn8of40\)"):
        read_together((one, two))


def test_names_that_clash_only_together_are_refused(evaluation: Path) -> None:
    def parted(table: pd.DataFrame) -> pd.DataFrame:
        return table.assign(stratum=["tall", "wide"] * (len(table) // 2))

    one, two = copied(evaluation, "run", parted), copied(evaluation, "run.tall", parted)
    with pytest.raises(EvaluationIncomplete, match=r"base@run\.tall: .* base@run for tall"):
        read_together((one, two))


def test_other_sampling_is_compared_and_other_code_is_said(evaluation: Path) -> None:
    one, two = copied(evaluation, "one"), copied(evaluation, "two")
    lock(one)
    lock(two, asked={"steps": 9})
    assert not any("code" in note for note in read_together((one, two)).notes)
    lock(two, code="d" * 64)
    assert "two: measured by other code under the same protocols" in read_together((one, two)).notes


def test_tables_of_other_protocols_or_items_are_refused_without_locks(evaluation: Path) -> None:
    other = copied(evaluation, "other", lambda t: t.assign(protocol="psnr/v0"))
    with pytest.raises(
        EvaluationIncomplete, match=r"protocol of psnr_db psnr/v0, was psnr/rgb8/v1"
    ):
        read_together((evaluation, other))
    far = copied(evaluation, "far")
    text = (far / "pictures.jsonl").read_text()
    (far / "pictures.jsonl").write_text(text.replace('"item": "item', '"item": "other'))
    with pytest.raises(EvaluationIncomplete, match="no item in common"):
        read_together((evaluation, far))


def test_judge_time_and_prompts_of_worst_cases_stand_on_the_page(
    evaluation: Path, tmp_path: Path
) -> None:
    part = {"a": 6, "b": 1, "tie": 1, "win_rate_a": 0.8125, "win_rate_interval": [0.4, 0.95]}
    judged = tmp_path / "judged"
    judged.mkdir()
    summary = {
        "model": "vlm",
        "a": "mine",
        "b": "base",
        "questions": {"detail": part | {"warnings": ["order bias: A"], "prompt": "judge-detail-1"}},
    }
    (judged / "summary.json").write_text(json.dumps(summary))
    timing = Timing("mine", 64, 96, 0.5, (9.0,), (4.0, 5.0, 6.0), 2**31, step_s=(0.25,))
    write_runtime([timing], {}, "cpu", tmp_path / "timed" / "runtime.json", sampling={})
    options = ReportOptions(resamples=200, judged=(judged,), timed=(tmp_path / "timed",))
    html = build_suite_report(evaluation, evaluation.parent, options).html
    beside = html[html.index('<section id="beside">') : html.index('<section id="worst">')]
    text = " ".join(re.sub(r"<[^>]+>", " ", beside).split())
    assert "mine over base, judged by vlm" in text
    assert "81.2 40.0 to 95.0, 8 pairs" in text
    assert "order bias: A" in text
    assert "mine, 96x64 5.00 4.00 to 6.00, n = 3 0.250" in text
    worst = html[html.index('<section id="worst">') : html.index('<section id="images">')]
    assert "&lt;b&gt;prompt&lt;/b&gt; 3 &amp; more" in worst
    plain = build_suite_report(evaluation, evaluation.parent, ReportOptions(resamples=200)).html
    assert '<section id="beside">' not in plain


def test_the_deciding_column_stands_second(evaluation: Path) -> None:
    html = build_suite_report(evaluation, evaluation.parent, ReportOptions(resamples=200)).html
    table = html[html.index('<section id="statistics">') : html.index('<section id="worst">')]
    heads = re.findall(r"<th[^>]*>([^<]*)</th>", table)
    assert heads[:3] == ["Metric", "At 5%", "base"]
    first = table[table.index("<tbody>") :].split("</tr>")[0]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", first, flags=re.S)
    assert re.search("better|worse|no difference|correction|undecided", cells[1])
    assert len(cells) == len(heads)


def test_the_command_compares_two_folders_and_says_the_verdict(
    evaluation: Path, root: Path, tmp_path: Path, typed: Callable[..., Any]
) -> None:
    later = copied(evaluation, "later", lambda t: t.assign(value=t["value"] + 2.0))
    project = evaluation.parent
    (project / "dvc.yaml").write_text("stages: {}\n")
    shutil.copy2(root / "params.yaml", project / "params.yaml")
    (project / "both.csv").symlink_to(tmp_path / "real.csv")
    (tmp_path / "r.html").symlink_to(tmp_path / "real.html")
    words = ("--with", str(later), "--baseline", "mine@evaluation", "--csv", "both.csv")
    done = typed(project, "report", str(evaluation), *words, "--out", str(tmp_path / "r.html"))
    assert done.returncode == 0, done.stderr
    assert "mine@later against mine@evaluation over 8 prompts: better in PSNR, SSIM" in done.stdout
    assert "mine@later,,psnr_db" in (tmp_path / "real.csv").read_text()
    refused = typed(project, "report", str(evaluation), "--with", str(tmp_path))
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1
    digest = hashlib.sha256((evaluation / "scores.parquet").read_bytes()).hexdigest()
    assert digest in (tmp_path / "real.html").read_text()
