"""Inputs that used to give wrong numbers without a word, through the command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from components.evaluation.pages.evaluation_files import read_evaluation
from components.evaluation.pages.suite_tables import metric_tables
from components.evaluation.suites.result_folder import taken

Typed = Callable[..., subprocess.CompletedProcess[str]]
Pixels = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture
def project(root: Path, tmp_path: Path) -> Path:
    """A project folder without code: settings and what marks its root."""
    for name in ("params.yaml", "dvc.yaml", "pyproject.toml"):
        shutil.copy2(root / name, tmp_path / name)
    shutil.copytree(root / "conf", tmp_path / "conf")
    return tmp_path


def texture(number: int, size: int = 64) -> Pixels:
    blocks = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(blocks).resize((size, size), Image.Resampling.BICUBIC))


def noisy(pixels: Pixels, sigma: float, seed: int) -> Pixels:
    noise = np.random.default_rng(seed).normal(0, sigma, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def write(folder: Path, pictures: dict[str, Pixels]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def suite(folder: Path, pictures: dict[str, Pixels]) -> Path:
    lines = [json.dumps({"file_name": f"{n}.png", "text": f"prompt {n}"}) for n in pictures]
    write(folder, pictures)
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def scores(project: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(project / "runs" / "evaluations" / name / "scores.parquet")


def words(system: str, metrics: str, *more: str) -> Sequence[str]:
    return ("--system", system, "--metrics", metrics, *more)


def test_pictures_named_by_bare_numbers_are_measured_against_their_own_item(
    project: Path, typed: Typed
) -> None:
    suite(project / "order", {f"scene_{n:02d}": texture(n) for n in range(12)})
    write(project / "mine", {str(n): noisy(texture(n), 3, n) for n in range(12)})
    done = typed(project, "evaluate", "order", *words("s=mine", "psnr_db"))
    assert done.returncode == 0
    assert "matched by their order (2 before 10)" in done.stdout
    values = scores(project, "order")["value"]
    assert values.min() > 37
    assert values.max() < 40


def test_sixteen_bits_are_scaled_and_said(project: Path, typed: Typed) -> None:
    gray = np.asarray(Image.fromarray(texture(0)).convert("L"))
    suite(project / "depth", {"gray8": texture(0), "gray16": texture(0)})
    write(project / "mine", {"gray8": gray, "gray16": gray.astype(np.uint16) * 257})
    done = typed(project, "evaluate", "depth", *words("s=mine", "psnr_db,nmse"))
    assert "1 of 2 pictures are not plain 8-bit sRGB (16-bit" in done.stdout
    for _, rows in scores(project, "depth").groupby("metric"):
        assert rows["value"].nunique() == 1


def test_identical_pictures_are_counted_on_the_table_and_the_page(
    project: Path, typed: Typed
) -> None:
    suite(project / "identical", {name: texture(n) for n, name in enumerate("abcdefg")})
    write(
        project / "mine",
        {n: texture(i) if i < 4 else noisy(texture(i), 25, i) for i, n in enumerate("abcdefg")},
    )
    write(project / "same", {name: texture(n) for n, name in enumerate("abcdefg")})
    more = ("--system", "lossless=same")
    done = typed(project, "evaluate", "identical", *words("s=mine", "psnr_db,ssim", *more))
    assert "4 of 7 identical" in done.stdout
    assert "∞ (7 of 7 identical)" in done.stdout
    folder = project / "runs" / "evaluations" / "identical"
    numbers = json.loads((folder / "metrics.json").read_text())["metrics"]
    assert numbers["s.psnr_db_n"] == 3
    assert numbers["s.psnr_db_infinite"] == 4
    assert "lossless.psnr_db" not in numbers
    assert typed(project, "report", str(folder)).returncode == 0
    page = (folder / "report.html").read_text()
    assert "4 of 7 identical" in page
    assert "7 of 7 identical" in page


def test_infinite_is_the_worst_where_lower_is_better(project: Path, typed: Typed) -> None:
    black = np.zeros((64, 64, 3), np.uint8)
    base = {name: black if n < 2 else texture(n) for n, name in enumerate("abcd")}
    suite(project / "dark", base)
    write(project / "good", {n: p if p is black else noisy(p, 3, 0) for n, p in base.items()})
    write(project / "bad", {n: noisy(p, 3, 0) for n, p in base.items()})
    more = ("--system", "bad=bad")
    done = typed(project, "evaluate", "dark", *words("good=good", "nmse,psnr_db", *more))
    assert "2 of 4 infinite" in done.stdout
    folder = project / "runs" / "evaluations" / "dark"
    (table,) = metric_tables(read_evaluation(folder))
    best = {row.name.partition(" ")[0]: [cell.best for cell in row.cells] for row in table.rows}
    assert best == {"good": [True, True], "bad": [False, False]}
    table_words = ("reconstruction", "--from", str(folder), "--csv", "t.csv")
    assert typed(project, "paper", "table", *table_words).returncode == 0
    cells = pd.read_csv(project / "t.csv").set_index(["system", "measure"])
    assert "2 of 4 infinite" in cells.loc[("bad", "nmse"), "text"]
    assert "2 of 4 identical" in cells.loc[("good", "psnr_db"), "text"]
    assert cells.loc[("bad", "nmse"), "infinite"] == 2


def test_a_system_called_reference_keeps_its_own_pictures(project: Path, typed: Typed) -> None:
    suite(project / "set", {"a": texture(0)})
    write(project / "mine", {"a": noisy(texture(0), 3, 0)})
    typed(project, "evaluate", "set", *words("reference=mine", "psnr_db"))
    assert typed(project, "report", "runs/evaluations/set").returncode == 0
    page = (project / "runs" / "evaluations" / "set" / "report.html").read_text()
    assert '"systems": ["reference", "(reference)"]' in page


def test_another_size_is_refused_or_stands_under_its_own_title(project: Path, typed: Typed) -> None:
    suite(project / "half", {name: texture(n) for n, name in enumerate("abc")})
    write(project / "mine", {name: texture(n, 32) for n, name in enumerate("abc")})
    write(project / "right", {name: texture(n) for n, name in enumerate("abc")})
    wanted = words("s=mine", "colourfulness")
    refused = typed(project, "evaluate", "half", *wanted)
    assert refused.returncode == 1
    assert "3 of 3 pictures are 32x32 instead of 64x64" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    more = ("--system", "right=right", "--any-size", "--baseline", "right")
    done = typed(project, "evaluate", "half", *wanted, *more)
    assert done.returncode == 0
    own, _, _ = done.stdout.partition("not compared")
    title = "Not at the suite's sizes, so not comparable with it"
    assert title in own
    before, after = own.split(title)
    assert "right" in before
    assert "│ s " not in before
    assert "│ s " in after
    assert "have no partner" in done.stdout
    folder = project / "runs" / "evaluations" / "half"
    assert json.loads((folder / "metrics.json").read_text())["sizes"]["s"] == {"32x32": 3}
    typed(project, "report", str(folder), "--baseline", "right")
    assert title.replace("'", "&#39;") in (folder / "report.html").read_text()


def test_pictures_of_another_size_or_suite_do_not_compare_with_printed_numbers(
    project: Path, typed: Typed
) -> None:
    names = [f"aesthetic-eval-{size}" for size in (2048, 4096)]
    for name in names:
        suite(project / "data" / "benchmarks" / name, {"a": texture(0, 256)})
    suite(project / "own" / "detail", {"a": texture(1, 256)})
    write(project / "mine", {f"{name}_a": texture(1, 256) for name in names})
    for asked, reason in (
        (("detail", *words("mine=mine", "glcm_score", "--any-size")), "not at the suite's sizes"),
        (("own/detail", *words("mine=references", "glcm_score")), "another suite of that name"),
    ):
        done = typed(project, "evaluate", *asked, "--out", "measured")
        assert done.returncode == 0, done.stderr
        assert ("Published" in done.stdout) == (asked[0] == "detail")
        table = ("paper", "table", "diffusion4k-detail-4096", "--from", "measured")
        done = typed(project, *table, "--csv", "t.csv")
        assert "equal protocol ids" not in done.stdout
        assert reason in done.stdout
        cells = pd.read_csv(project / "t.csv")
        assert set(cells["comparable"].dropna()) == {False}
        typed(project, "report", "measured")
        page = (project / "measured" / "report.html").read_text()
        assert ("Fine detail, Aesthetic-Eval@2048" in page) == (asked[0] == "detail")
        shutil.rmtree(project / "measured")


def test_a_second_run_on_a_folder_is_refused_and_a_failed_one_replaces_nothing(
    project: Path, typed: Typed
) -> None:
    suite(project / "s", {name: texture(n) for n, name in enumerate("ab")})
    write(project / "mine", {name: texture(n) for n, name in enumerate("ab")})
    folder = project / "runs" / "evaluations" / "s"
    wanted = words("m=mine", "colourfulness")
    with taken(folder):
        refused = typed(project, "evaluate", "s", *wanted)
    assert refused.returncode == 2
    assert "another run (process" in refused.stderr
    assert typed(project, "evaluate", "s", *wanted).returncode == 0
    names = ("scores.parquet", "metrics.json", "pictures.jsonl")
    good = {name: (folder / name).read_bytes() for name in names}
    (project / "mine" / "b.png").unlink()
    failed = typed(project, "evaluate", "s", *wanted)
    assert failed.returncode == 1
    assert "stays as it was" in failed.stdout
    assert good == {name: (folder / name).read_bytes() for name in names}
    assert (folder / "failed" / "metrics.json").is_file()


def test_a_second_run_is_held_to_the_lock_of_the_first(project: Path, typed: Typed) -> None:
    suite(project / "set", {"a": texture(0), "b": texture(1)})
    folder = project / "runs" / "evaluations" / "set"
    asked = ("evaluate", "set", *words("s=set", "psnr_db"))
    assert typed(project, *asked).returncode == 0
    lock = (folder / "evaluation.lock.json").read_text()
    kept = (folder / "metrics.json").read_bytes()
    write(project / "set", {"b": noisy(texture(1), 20, 0)})
    for message, more in (("this run differs: items ", ()), ("seed 3, was 0", ("--seed", "3"))):
        refused = typed(project, *asked, *more)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
        assert (folder / "metrics.json").read_bytes() == kept
    assert typed(project, *asked, "--relock").returncode == 0
    assert (folder / "evaluation.lock.json").read_text() != lock


def test_files_of_two_runs_are_no_evaluation(project: Path, typed: Typed) -> None:
    suite(project / "s", {name: texture(n) for n, name in enumerate("ab")})
    typed(project, "evaluate", "s", *words("m=references", "colourfulness"))
    folder = project / "runs" / "evaluations" / "s"
    table = scores(project, "s")
    table.assign(value=table["value"] + 1).to_parquet(folder / "scores.parquet")
    done = typed(project, "report", str(folder))
    assert done.returncode == 2
    assert "scores.parquet is of another run than metrics.json" in done.stderr


def stopping(project: Path, *systems: tuple[str, float, int]) -> tuple[str, ...]:
    """24 items, systems (name, noise, seed), and the words that stop at a decision."""
    names = [f"p{number:02d}" for number in range(24)]
    suite(project / "set", {name: texture(place) for place, name in enumerate(names)})
    words: tuple[str, ...] = ("evaluate", "set", "--metrics", "psnr_db")
    for system, sigma, seed in systems:
        noise = {n: noisy(texture(p), sigma, seed + p) for p, n in enumerate(names)}
        write(project / system, noise)
        words += ("--system", f"{system}={system}")
    return words


def test_an_evaluation_stops_once_its_metric_has_decided(project: Path, typed: Typed) -> None:
    asked = stopping(project, ("close", 2.0, 100), ("far", 20.0, 100))
    stop = ("--baseline", "close", "--stop-when-decided", "psnr_db", "--looks", "3")
    done = typed(project, *asked, *stop)
    assert done.returncode == 0, done.stderr
    assert "decided after 8 of 24 prompts (look 1 of 3): far is worse" in done.stdout
    assert "stopped early" in done.stdout
    assert "left out" not in done.stdout
    # Eight prompts of two systems, one value each: nothing else was measured.
    assert "16 pictures, 16 decoded, 16 values computed" in done.stdout
    described = json.loads((project / "runs/evaluations/set/metrics.json").read_text())
    assert described["looks"]["far"]["prompts"] == 8
    assert described["looks"]["far"]["high"] < 0
    assert described["protocol"].endswith("+drawn8of24")
    for words, message in (
        (stop[2:], "name two systems, and one as --baseline"),
        ((*stop[:3], "fid", *stop[4:]), "--stop-when-decided fid: of sets"),
        ((*stop[:3], "ssim", *stop[4:]), "not among the metrics"),
        ((*stop[:3], "hpsv3", "--metrics", "hpsv3"), "HPSv3 weights not found"),
        ((*stop[:5], "4"), "--looks 4: the first of 4 looks at 24 prompts"),
    ):
        refused = typed(project, *asked, *words, "--out", "refused")
        assert refused.returncode == 2
        assert message in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_an_evaluation_goes_through_all_prompts_where_its_metric_has_no_value(
    project: Path, typed: Typed
) -> None:
    asked = stopping(project, ("close", 2.0, 100), ("far", 20.0, 100))
    (project / "close" / "no_item.png").write_bytes((project / "close" / "p00.png").read_bytes())
    stop = ("--baseline", "close", "--stop-when-decided", "flat_fraction", "--looks", "3")
    done = typed(project, *asked, "--metrics", "psnr_db,flat_fraction", *stop)
    assert done.returncode == 0, done.stderr
    assert "stopped early" not in done.stdout
    assert "after 24 of 24 prompts: far and close have values of Flat fraction for 0" in done.stdout
    assert "close: 1 of 25 pictures have no item's name" in done.stdout
    done = typed(project, *asked, "--limit", "8", "--out", "limited")
    assert "close: 1 of 25 pictures have no item's name" in done.stdout
    assert "far: " not in done.stdout


def test_a_result_holds_what_json_can_hold(project: Path, typed: Typed) -> None:
    asked = stopping(project, ("close", 2.0, 100), ("far", 20.0, 100))
    for system, colour in (("close", 10), ("far", 90)):
        flat = np.full((64, 64, 3), (colour, 0, 0), np.uint8)
        write(project / system, {f"p{number:02d}": flat for number in range(24)})
    stop = ("--baseline", "close", "--stop-when-decided", "colourfulness", "--looks", "3")
    done = typed(project, *asked, "--metrics", "colourfulness", *stop)
    assert "decided after 8 of 24 prompts" in done.stdout, done.stderr
    text = (project / "runs/evaluations/set/metrics.json").read_text()
    assert "Infinity" not in text
    assert json.loads(text)["looks"]["far"]["deviate"] is None


@pytest.mark.slow
def test_an_evaluation_of_equal_systems_sees_every_prompt(project: Path, typed: Typed) -> None:
    asked = stopping(project, ("close", 2.0, 100), ("same", 2.0, 500))
    stop = ("--baseline", "close", "--stop-when-decided", "psnr_db", "--looks", "3")
    equal = typed(project, *asked, *stop)
    assert "not decided after 24 of 24 prompts: PSNR of same minus close" in equal.stdout
    assert "stopped early" not in equal.stdout
    described = json.loads((project / "runs/evaluations/set/metrics.json").read_text())
    assert "+drawn" not in described["protocol"]


def test_pictures_without_a_value_are_counted_and_said(project: Path, typed: Typed) -> None:
    pictures = {"a": texture(0, 256), "b": texture(1, 256), "c": texture(2, 64)}
    suite(project / "mixed", pictures)
    write(project / "mine", {name: noisy(one, 3, 0) for name, one in pictures.items()})
    done = typed(project, "evaluate", "mixed", *words("s=mine", "psnr_db,flat_fraction"))
    assert done.returncode == 0
    assert "s: flat_fraction has no value for 1 of 3 pictures" in done.stdout
    assert "such as c.png (64x64)" in done.stdout
    done = typed(project, "report", "runs/evaluations/mixed")
    assert done.returncode == 0
    page = (project / "runs" / "evaluations" / "mixed" / "report.html").read_text()
    assert "flat_fraction has no value for 1 of 3 pictures" in page
    assert "s (n = 3)" in page
    assert "n = 2" in page
    only = suite(project / "small", {"c": texture(2, 64)})
    done = typed(project, "evaluate", str(only), *words("s=small", "flat_fraction"))
    assert done.returncode == 1
    assert "error: s: no metric has a value for any picture" in done.stderr


def test_a_broken_picture_is_in_no_mean_and_no_success(project: Path, typed: Typed) -> None:
    pictures = {name: texture(n, 128) for n, name in enumerate("abc")}
    suite(project / "base", pictures)
    write(project / "mine", pictures)
    whole = (project / "mine" / "b.png").read_bytes()
    (project / "mine" / "b.png").write_bytes(whole[: len(whole) // 2])
    done = typed(project, "evaluate", "base", *words("s=mine", "glcm_score"))
    assert done.returncode == 1
    assert "s: 1 of 3 pictures could not be measured and are in no mean: b.png: " in done.stdout
    assert "error: s: 1 of 3 pictures could not be measured" in done.stderr
    assert typed(project, "report", "runs/evaluations/base").returncode == 0
    page = (project / "runs" / "evaluations" / "base" / "report.html").read_text()
    assert "s (n = 2)" in page
    assert "s 2 of 128x128." in page
    assert "could not be measured" in page
    (project / "base" / "a.png").write_bytes(whole[: len(whole) // 2])
    write(project / "mine", pictures)
    done = typed(project, "evaluate", "base", *words("s=mine", "psnr_db", "--relock"))
    assert done.returncode == 1
    assert "reference a.png: " in done.stdout


def test_references_that_are_not_plain_are_said_too(project: Path, typed: Typed) -> None:
    gray = np.asarray(Image.fromarray(texture(0)).convert("L"))
    write(project / "deep", {"g": gray.astype(np.uint16) * 257})
    Image.fromarray(gray.astype(np.float32)).save(project / "deep" / "f.tif")
    lines = [json.dumps({"file_name": name, "text": "x"}) for name in ("g.png", "f.tif")]
    (project / "deep" / "metadata.jsonl").write_text("\n".join(lines))
    write(project / "mine", {"g": gray, "f": gray})
    done = typed(project, "evaluate", "deep", *words("s=mine", "psnr_db"))
    assert done.returncode == 0
    assert "references: 2 of 2 pictures are not plain 8-bit sRGB (16-bit I;16, 32-bit F)" in (
        done.stdout
    )
    assert "floating-point values by 1, or where they exceed it by the largest" in done.stdout
    done = typed(project, "evaluate", "deep", *words("s=mine", "glcm_score"))
    assert "references:" not in done.stdout


def test_names_match_however_an_accent_is_written(project: Path, typed: Typed) -> None:
    suite(project / "base", {"é": texture(0), "o p": texture(1)})
    write(project / "mine", {"e\u0301": texture(1), "o p": texture(0)})
    done = typed(project, "evaluate", "base", *words("s=mine", "psnr_db"))
    assert done.returncode == 0
    assert "note" not in done.stdout
    assert scores(project, "base")["value"].max() < 30


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"file_name": ".", "text": "x"}, "line 1: file_name '.' names no file"),
        ({"file_name": "a.png", "text": "\ud800 x"}, "line 1: half of a character"),
    ],
)
def test_a_row_that_names_nothing_says_its_line(
    project: Path, typed: Typed, row: dict[str, str], said: str
) -> None:
    (project / "base").mkdir()
    (project / "base" / "metadata.jsonl").write_text(json.dumps(row))
    done = typed(project, "evaluate", "base", *words("s=references", "psnr_db"))
    assert done.returncode == 2
    assert said in done.stderr


def test_a_page_takes_judgements_and_times_from_their_own_folders(
    project: Path, typed: Typed
) -> None:
    suite(project / "base", {"a": texture(0), "b": texture(1)})
    assert typed(project, "evaluate", "base", *words("s=base", "glcm_score")).returncode == 0
    folder = "runs/evaluations/base"
    done = typed(project, "report", folder, "--judged", folder)
    assert (done.returncode, "no judgement (summary.json)" in done.stderr) == (2, True)
    done = typed(project, "report", folder, "--runtime", folder)
    assert (done.returncode, "no times (runtime.json)" in done.stderr) == (2, True)
    for name in ("metrics.json", "pictures.jsonl"):
        before = (project / folder / name).read_bytes()
        (project / folder / name).write_text("[1]")
        done = typed(project, "report", folder)
        assert (done.returncode, "not an evaluation" in done.stderr) == (2, True)
        assert "Traceback" not in done.stderr
        (project / folder / name).write_bytes(before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_command_ends_the_program_it_runs(
    project: Path, root: Path, number: signal.Signals
) -> None:
    suite(project / "base", {"a": texture(0)})
    # Through a shell, as a launcher's script would: what it started ends as well.
    (project / "hang.sh").write_text("sleep 300 & echo $! > pid; wait\n")
    command = [str(Path(sys.executable).parent / "ultraflux"), "evaluate", "base"]
    command += words("s=command:sh hang.sh {prompts} {out}", "psnr_db")
    running = subprocess.Popen(
        command,
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A test run in the background may ignore it, and a child would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    deadline = time.monotonic() + 60
    while not (project / "pid").is_file() or not (project / "pid").read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = int((project / "pid").read_text())
    running.send_signal(number)
    assert running.wait(30) != 0
    assert not Path(f"/proc/{started}/stat").exists() or " Z " in (
        Path(f"/proc/{started}/stat").read_text()
    )
