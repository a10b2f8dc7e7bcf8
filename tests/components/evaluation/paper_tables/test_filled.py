"""Published tables with ours beneath: digits as printed, reasons, and commands that parse."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from components.evaluation.pages.table_export import as_latex
from components.evaluation.paper_tables.export import as_csv, as_json, as_page_table
from components.evaluation.paper_tables.filled import FilledTable, fill
from components.evaluation.paper_tables.records import (
    Number,
    Record,
    default_records,
    given_records,
    read_record,
)
from components.evaluation.suites.runtime_suite import Timing, write_runtime
from components.evaluation.suites.suites import suite_names
from components.metrics.cards import CARDS, card
from components.metrics.paper_tables import TABLES, paper_table, table_of_suite

PRINTED = "edea59549eb7f137"
"""First digits of the sha256 of every printed label and number; compared with the papers' text."""


def test_what_is_printed_is_what_was_compared_with_the_papers() -> None:
    printed = "\n".join(
        "|".join((table.name, row.stratum, row.label, *row.values))
        for table in TABLES
        for row in table.rows
    )
    assert sum(bool(v) for t in TABLES for row in t.rows for v in row.values) == 214
    assert hashlib.sha256(printed.encode()).hexdigest().startswith(PRINTED)


def test_every_table_has_a_suite_and_every_column_a_measure_of_ours() -> None:
    known = {c.id for c in CARDS}
    protocols = {c.protocol for c in CARDS}
    for table in TABLES:
        assert all(len(row.values) == len(table.fields) for row in table.rows), table.name
        if table.filling in ("evaluation", "ablation"):
            assert set(table.metrics) <= known
        if table.filling in ("evaluation", "runtime"):
            assert table.suite in suite_names()
        assert {f.protocol for f in table.fields if f.protocol} <= protocols
        assert all(f.script for f in table.fields)
    assert len({table.name for table in TABLES}) == len(TABLES)
    with pytest.raises(ValueError, match=r"no table 'mian'; tables: main, aspect-ratios"):
        paper_table("mian")


def test_tables_of_one_suite_and_layout_stand_together() -> None:
    detail = table_of_suite("detail")
    assert detail is not None
    assert [row.stratum for row in detail.rows] == ["2048x2048"] * 4 + ["4096x4096"] * 3
    assert table_of_suite("runtime") is None


def record(table: str, system: str, **more: Any) -> Record:
    """One system with a number in every column of a table without groups."""
    chosen = paper_table(table)
    numbers = {(system, "", m): Number(10.0, 9.0, 11.0, 195) for m in chosen.metrics}
    protocols = {m: card(m).protocol for m in chosen.metrics}
    made = Record(
        *(Path("runs/x"), chosen.suite, numbers, protocols),
        suite=chosen.suite,
        protocol=f"{chosen.suite}/v1",
    )
    return replace(made, **more)


def ours(filled: FilledTable, system: str, stratum: str = "") -> Any:
    (row,) = (
        row
        for row in filled.rows
        if not row.is_published and (row.label, row.stratum) == (system, stratum)
    )
    return row


def test_a_number_of_ours_has_the_printed_digits_and_says_whether_it_compares(
    tmp_path: Path,
) -> None:
    table = paper_table("diffusion4k-2048")
    filled = fill(table, [record(table.name, "sd3-f16-wlf")], tmp_path)
    row = ours(filled, "sd3-f16-wlf")
    assert [cell.text for cell in row.cells] == ["10.00 [9.00, 11.00]"] * 3
    assert [cell.incomparable for cell in row.cells][:2] == ["", ""]
    assert "do not state the protocol" in row.cells[2].incomparable
    assert (row.n, filled.measured, filled.open_cells) == (195, 3, 9)
    place = [row.label for row in filled.rows].index("SD3-F16-WLF@2048")
    assert filled.rows[place + 1].label == "sd3-f16-wlf"


def test_another_suite_a_part_of_it_and_another_protocol_do_not_compare(tmp_path: Path) -> None:
    table = paper_table("diffusion4k-2048")
    whole = record(table.name, "mine")
    others = {
        "another suite": replace(whole, suite="mine"),
        "a namesake": replace(whole, protocol="folder/v1"),
        "a part": replace(whole, protocol="aesthetic-eval-2048/v1+first8"),
        "another size": replace(whole, other_sizes={"mine": "8 of 8 pictures are 256x256"}),
        "measured under": replace(whole, protocols=dict.fromkeys(table.metrics, "other/v9")),
    }
    messages = {
        name: ours(fill(table, [one], tmp_path), "mine").cells[0].incomparable
        for name, one in others.items()
    }
    assert messages["another suite"] == "measured on suite mine, not aesthetic-eval-2048"
    assert messages["a namesake"].startswith("measured on another suite of that name (folder/v1,")
    assert "aesthetic-eval-2048/v1+first8" in messages["a part"]
    assert messages["another size"] == "not at the suite's sizes: 8 of 8 pictures are 256x256"
    assert messages["measured under"].endswith("ours under other/v9")


def test_identical_pictures_are_counted_and_the_later_record_wins(tmp_path: Path) -> None:
    table = paper_table("reconstruction")
    first = record(table.name, "mine")
    key = ("mine", "", "psnr_db")
    later = replace(first, numbers={key: Number(20.4, n=3, infinite=4)})
    row = ours(fill(table, [first, later], tmp_path), "mine")
    assert row.cells[2].text == "∞ (4 of 7 identical; 20.40 over the others)"
    assert row.cells[3].text == "10.000 [9.000, 11.000]"
    alone = replace(first, numbers={key: Number(float("inf"), n=0, infinite=7)})
    filled = fill(table, [alone], tmp_path)
    assert ours(filled, "mine").cells[2].text == "∞ (7 of 7 identical)"
    assert json.loads(json.dumps(as_json(filled), allow_nan=False))


def test_groups_are_filled_apart_and_groups_of_our_own_come_last(tmp_path: Path) -> None:
    table = paper_table("aspect-ratios")
    numbers = {
        ("sana", "4096x2048", "fid_fitted"): Number(150.0),
        ("sana", "5120x2880", "fid_fitted"): Number(153.0),
        ("sana", "", "fid_fitted"): Number(1.0),
        ("mine", "512x512", "fid_fitted"): Number(7.0),
    }
    protocols = {"fid_fitted": card("fid_fitted").protocol}
    record = Record(
        *(Path("x"), table.suite, numbers, protocols), suite=table.suite, protocol="aspect-ratio/v1"
    )
    filled = fill(table, [record], tmp_path)
    assert ours(filled, "sana", "4096x2048").cells[0].text == "150.00"
    assert ours(filled, "sana", "5120x2880").cells[0].text == "153.00"
    assert ours(filled, "sana", "2048x4096").cells[0].needs
    assert filled.rows[-1].stratum == "512x512"
    assert filled.rows[-1].cells[0].incomparable == "a group that the table lacks: 512x512"
    assert "1.00" not in {cell.text for row in filled.rows for cell in row.cells}


def test_what_is_measured_is_asked_for_no_more_and_each_need_is_listed_once(
    tmp_path: Path,
) -> None:
    table = paper_table("diffusion4k-2048")
    nothing = fill(table, [], tmp_path)
    assert len(set(nothing.needs)) == len(nothing.needs)
    (benchmark,) = (n for n in nothing.needs if "no local copy" in n.what)
    assert benchmark.command.startswith("hf download zhang0jhon/Aesthetic-4K")
    clip = ours(nothing, "sd3-f16").cells[1]
    needed = [nothing.needs[place - 1] for place in clip.needs]
    assert [n.what for n in needed][1:] == [
        "weights of CLIP score (B/16)",
        "weights/SD3-F16: a saved diffusers pipeline of SD3-F16@2048",
        "measured",
    ]
    (tmp_path / "weights" / "SD3-F16").mkdir(parents=True)
    fewer = fill(table, [], tmp_path)
    assert not any("weights/SD3-F16:" in need.what for need in fewer.needs)
    missing = {"clip_score_b16": "CLIP weights not found at x; get it with: hf download x"}
    part = replace(
        record(table.name, "sd3-f16"),
        numbers={("sd3-f16", "", "fid_fitted"): Number(1.0)},
        missing=missing,
    )
    half = fill(table, [part], tmp_path)
    cell = ours(half, "sd3-f16").cells[1]
    assert ("CLIP weights not found at x", "hf download x") in {
        (half.needs[place - 1].what, half.needs[place - 1].command) for place in cell.needs
    }


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_command_that_fills_a_table_is_one_that_our_programs_take(
    table: Any, tmp_path: Path
) -> None:
    import typer

    from flows.cli import app

    group: Any = typer.main.get_command(app)
    filled = fill(table, [], tmp_path)
    assert filled.open_cells == sum(len(row.cells) for row in filled.rows if not row.is_published)
    commands = [need.command for need in filled.needs if need.command.startswith("ultraflux")]
    assert commands
    for line in commands:
        _, name, *words = shlex.split(line)
        with group.commands[name].make_context(name, words) as context:
            if name == "evaluate":
                assert context.params["suite"] == table.suite
                assert all("=" in system for system in context.params["system"])
    # Two ways of asking never share a folder.
    folders = [line.partition("--out ")[2].partition(" ")[0] for line in commands]
    assert len(set(folders)) == len(folders)


def test_times_and_memory_are_read_from_the_runtime_suite(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "evaluations" / "runtime"
    timing = Timing(
        *("sana", 4096, 4096, 0.5, (9.0,), (40.0, 50.0, 48.0), 30_000_000_000),
        step_s=(1.0, 1.5, 2.0),
    )
    write_runtime(
        [timing], {}, "cpu", folder / "runtime.json", sampling={"num_inference_steps": 50}
    )
    records = default_records(paper_table("runtime"), tmp_path)
    filled = fill(paper_table("runtime"), records, tmp_path)
    (cell,) = ours(filled, "sana", "4096x4096").cells
    assert cell.text == "48.00 [40.00, 50.00]"
    assert cell.incomparable.startswith("measured on ")
    memory = fill(paper_table("diffusion4k-memory"), records, tmp_path)
    texts = [cell.text for cell in ours(memory, "sana", "4096x4096").cells]
    assert texts == ["30.0", "1.50"]
    assert any("num_inference_steps 50" in note for note in filled.notes)
    scale = ours(filled, "scalecrafter", "4096x4096").cells[0]
    assert "start would be timed" in filled.needs[scale.needs[0] - 1].what


def test_preferences_are_read_from_a_judges_summary(tmp_path: Path) -> None:
    part = {"a": 6, "b": 1, "tie": 1, "win_rate_a": 0.8125, "win_rate_interval": [0.4, 0.95]}
    summary = {
        "model": "vlm",
        "a": "ultraflux",
        "b": "sana",
        "questions": {"aesthetics": part | {"warnings": ["order bias"], "prompt": "judge-x-1"}},
    }
    (tmp_path / "judged").mkdir()
    (tmp_path / "judged" / "summary.json").write_text(json.dumps(summary))
    filled = fill(
        paper_table("preference"), default_records(paper_table("preference"), tmp_path), tmp_path
    )
    row = ours(filled, "ultraflux")
    assert row.cells[0].text == "81.2 [40.0, 95.0]"
    assert row.n == 8
    assert "asked judge-x-1 (ultraflux over sana, judged by vlm)" in row.cells[0].incomparable
    assert row.cells[1].needs
    assert any("order bias" in note for note in filled.notes)


@pytest.fixture
def arm(tmp_path: Path, evaluation: Path) -> Path:
    """The tree of an arm whose model was evaluated alone."""
    tree = tmp_path / "runs" / "ablate" / "ladder" / "snr-hw"
    inside = tree / "runs" / "ablation"
    shutil.copytree(evaluation, inside)
    table = pd.read_parquet(evaluation / "scores.parquet").assign(metric="hpsv3", protocol="x")
    table[table["system"] == "mine"].to_parquet(inside / "scores.parquet")
    described = json.loads((inside / "metrics.json").read_text())
    described["metrics"] = {"mine.hpsv3": 9.0, "mine.hpsv3_n": 8.0}
    (inside / "metrics.json").write_text(json.dumps(described))
    lines = (inside / "pictures.jsonl").read_text().splitlines(keepends=True)
    ours = [line for line in lines if '"system": "mine"' in line]
    (inside / "pictures.jsonl").write_text("".join(ours))
    return tree


def test_arms_of_an_ablation_are_read_from_their_trees(
    arm: Path, tmp_path: Path, evaluation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = paper_table("ablation")
    (found,) = default_records(table, tmp_path)
    assert found.systems == ("snr-hw",)
    assert default_records(paper_table("data-model"), tmp_path) == []
    for place, given in ((arm, "."), (arm / "runs", "ablation"), (arm, "runs/ablation")):
        monkeypatch.chdir(place)
        (record,) = given_records(table, [Path(given)])
        assert record.systems == ("snr-hw",)
    (arm / "runs" / "ablation").rename(tmp_path / "alone")
    (record,) = given_records(table, [tmp_path / "alone"])
    assert record.systems == ("mine",)
    (arm / "runs" / "ablation").symlink_to(evaluation)
    with pytest.raises(
        ValueError, match=r"several systems \(base, mine\); the evaluation of an arm"
    ):
        given_records(table, [arm])


def test_folders_without_a_number_of_the_table_are_refused(evaluation: Path) -> None:
    for name in ("ablation", "main"):
        with pytest.raises(
            ValueError, match=rf"reconstruction has no .* table {name} \(fid_fitted, hps"
        ):
            given_records(paper_table(name), [evaluation])


def test_an_evaluation_becomes_rows_and_leaves_as_csv_and_latex(
    evaluation: Path, tmp_path: Path
) -> None:
    found = read_record(evaluation)
    assert found.numbers["mine", "", "psnr_db"].n == 8
    assert "weights missing" in found.missing["lpips"]
    filled = fill(paper_table("reconstruction"), [found], tmp_path)
    assert ours(filled, "mine").cells[0].text == "1.250"
    rows = list(csv.DictReader(io.StringIO(as_csv(filled))))
    assert len(rows) == len(filled.rows) * 5
    (psnr,) = (r for r in rows if r["system"] == "mine" and r["measure"] == "psnr_db")
    assert float(psnr["value"]) == pytest.approx(32.0)
    assert (psnr["comparable"], psnr["n"]) == ("false", "8")
    (printed,) = (r for r in rows if r["system"] == "UltraFlux-F16-VAE" and r["measure"] == "rfid")
    assert (printed["text"], printed["value"]) == ("0.547", "")
    (lacking,) = (r for r in rows if r["system"] == "ultraflux-vae" and r["measure"] == "ssim")
    assert "hf download Owen777/UltraFlux-v1" in lacking["needs"]
    page = as_page_table(filled)
    assert [row.name for row in page.rows][-1] == "mine, here (n = 8)"
    latex = as_latex([page])
    latex = as_latex([page])
    assert r"mine, here (n = 8) & 1.250$^{\dagger}$ & -- & 32.0" in latex
    below = latex.partition(r"\end{tabular}")[2]
    assert below.startswith("\n\\par\\smallskip{\\footnotesize UltraFlux, supplement, table 2. ")
    assert r"table 2. $^{\dagger}$PSNR $\uparrow$, SSIM $\uparrow$, rFID $\downarrow$: " in below
    assert latex.count(r"\dagger") == filled.measured + 1
    assert as_json(filled)["rows"][0]["cells"][0]["text"] == "2.201"


def test_the_command_prints_lists_and_refuses(
    evaluation: Path, root: Path, tmp_path: Path, typed: Callable[..., Any]
) -> None:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "params.yaml").write_bytes((root / "params.yaml").read_bytes())
    listed = typed(tmp_path, "paper", "table", "--json")
    assert {row["table"] for row in json.loads(listed.stdout)} == {t.name for t in TABLES}
    (tmp_path / "t.csv").symlink_to(tmp_path / "real.csv")
    words = ("--from", str(evaluation), "--csv", "t.csv", "--latex", "t.tex")
    done = typed(tmp_path, "paper", "table", "reconstruction", *words)
    assert done.returncode == 0, done.stderr
    assert "5 cells measured here, 15 open" in done.stdout
    assert "not comparable: " in done.stdout
    assert "ultraflux evaluate reconstruction --system" in done.stdout
    assert "mine, here" in (tmp_path / "t.tex").read_text()
    assert "UltraFlux-F16-VAE (published)" in (tmp_path / "t.tex").read_text()
    assert (tmp_path / "real.csv").read_text().count("\n") == 41
    for words, message in (
        (("nothing",), "no table 'nothing'; tables: main"),
        (("main", "--from", str(tmp_path)), "not an evaluation"),
    ):
        refused = typed(tmp_path, "paper", "table", *words)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
