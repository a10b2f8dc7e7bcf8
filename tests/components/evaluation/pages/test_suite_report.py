"""The page about an evaluation: complete, escaped, self-contained, the same bytes again."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from components.evaluation.pages.evaluation_files import EvaluationIncomplete, read_evaluation
from components.evaluation.pages.report_pictures import PictureChanged, crop_box
from components.evaluation.pages.suite_pictures import PicturesDoNotFit
from components.evaluation.pages.suite_report import (
    Paired,
    ReportOptions,
    build_suite_report,
    verdict_sentence,
)
from components.evaluation.suites.against_baseline import against_baseline
from components.evaluation.suites.suite_scores import headline

OPTIONS = ReportOptions(resamples=200)
RESERVE = 3_000_000


class Page(HTMLParser):
    """Texts, attributes that load, and script blocks by type."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.blocks: dict[str, tuple[str, str]] = {}
        self.data = ""
        self.text = ""
        self._script: dict[str, str | None] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.loads += [found[name] or "" for name in ("src", "srcset", "poster") if name in found]
        self._script = found if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.text += data
        elif self._script.get("type", "").startswith("image/"):
            self.blocks[str(self._script["id"])] = (str(self._script["type"]), data)
        elif self._script.get("type") == "application/json":
            self.data += data

    def picture(self, id: str) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(self.blocks[id][1])))

    @property
    def viewer(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.data)
        return found


@pytest.fixture(scope="module")
def html(evaluation: Path) -> str:
    """The page with all defaults."""
    return build_suite_report(evaluation, evaluation.parent, OPTIONS).html


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    """The same, parsed."""
    return Page(html)


def build(folder: Path, options: ReportOptions = OPTIONS, **more: Any) -> Page:
    return Page(build_suite_report(folder, folder.parent, options, **more).html)


def test_published_rows_stand_above_ours_in_the_papers_columns(html: str) -> None:
    table = html[html.index('<section id="metrics">') : html.index('<section id="statistics">')]
    heads = re.findall(r'<th scope="col">([^<]+)</th>', table)
    names = [head.replace("\u00a0", " ") for head in heads[:6]]
    assert names == ["System", "rFID ↓", "NMSE ↓", "PSNR ↑", "SSIM ↑", "LPIPS ↓"]
    assert table.index("UltraFlux-F16-VAE") < table.index("base (n = 8)")
    ours = table[table.index("mine (n = 8)") :]
    cells = re.findall(r"<td>([^<]*)", ours)
    assert cells[0] == "1.250"
    assert cells[1] == "–"
    assert cells[2] == "32.00"
    assert "weights missing" in table


@pytest.mark.parametrize(("strata", "is_open"), [(2, True), (8, False)])
def test_strata_have_a_table_of_their_own_that_is_folded_where_there_are_many(
    evaluation: Path, tmp_path: Path, strata: int, is_open: bool
) -> None:
    shutil.copytree(evaluation.parent, tmp_path / "copy")
    folder = tmp_path / "copy" / "evaluation"
    table = pd.read_parquet(folder / "scores.parquet")
    table["stratum"] = [f"size{int(item[4:]) % strata}" for item in table["item"]]
    table.to_parquet(folder / "scores.parquet", index=False)
    description = json.loads((folder / "metrics.json").read_text())
    description["metrics"] |= headline(table, resamples=200, seed=0)
    (folder / "metrics.json").write_text(json.dumps(description))
    html = build_suite_report(folder, folder.parent, OPTIONS).html
    part = html[html.index('<section id="metrics">') : html.index('<section id="statistics">')]
    summary = f'<details class="more"{" open" if is_open else ""}><summary>By stratum ({strata})'
    assert part.count(summary) == 1
    whole, folded = part.split(summary)
    assert "base (n = 8)" in whole
    assert "size0" not in whole
    assert f"size1, mine (n = {8 // strata})" in folded


def test_statistics_name_difference_both_p_values_and_what_could_be_detected(
    html: str, page: Page
) -> None:
    text = " ".join(page.text.split())
    assert "mine against base" in text
    # Mean of mine - base: (-1 - 1 - 1 - 9 - 1 - 1 - 1 + 3) / 8.
    assert "<td>33.50</td><td>32.00</td>\n<td>-1.50<" in html
    assert "p, Holm" in text
    assert "no difference found" in text


def test_the_largest_paired_loss_of_every_metric_comes_first(html: str) -> None:
    worst = html[html.index('<section id="worst">') : html.index('<section id="images">')]
    cases = re.findall(r"<code>(item\d)</code> <span class=\"loss\">loses ([\d.]+)", worst)
    assert cases[0] == ("item3", "9.00")
    assert ("item5", "0.400") in cases
    assert ("item7", "3.00") not in cases


def test_every_picture_has_a_thumbnail_and_native_pixels_at_one_place(
    evaluation: Path, page: Page
) -> None:
    assert page.viewer["systems"] == ["base", "mine"]
    assert len(page.viewer["items"]) == 8
    for item in page.viewer["items"]:
        boxes = []
        for system, picture in item["pictures"].items():
            assert picture["size"] == [700, 540]
            whole, *native = picture["layers"]
            assert whole["native"] is False
            assert max(page.picture(whole["p"]).size) == 256
            boxes.append([layer["box"] for layer in native])
            original = Image.open(evaluation.parent / system / f"{item['id'][4:]}.png")
            for layer in native:
                x, y, width, height = layer["box"]
                shown = np.asarray(page.picture(layer["p"]).convert("RGB"), dtype=float)
                expected = np.asarray(original.crop((x, y, x + width, y + height)), dtype=float)
                assert shown.shape == expected.shape
                # Lossy, but these pixels and no others: another place of the ramp differs.
                assert abs(shown - expected).mean() < 25
                assert abs(shown.mean() - expected.mean()) < 2
        assert boxes[0] == boxes[1]


def test_worst_cases_get_their_whole_native_pixels_while_the_budget_lasts(
    evaluation: Path, page: Page
) -> None:
    def whole(page: Page) -> set[str]:
        return {
            item["id"]
            for item in page.viewer["items"]
            for picture in item["pictures"].values()
            if any(
                layer["native"] and layer["box"] == [0, 0, 700, 540] for layer in picture["layers"]
            )
        }

    assert {"item3", "item5"} <= whole(page)
    assert "item7" not in whole(page)
    # Room for thumbnails and some crops: none is shown whole, the worst cases keep their crops.
    thumbnails = [data for kind, data in page.blocks.values() if kind == "image/jpeg"][:16]
    room = sum(map(len, thumbnails)) + 16 * 100 + 60_000
    options = replace(OPTIONS, budget_bytes=RESERVE + room)
    made = build_suite_report(evaluation, evaluation.parent, options).html
    assert len(made.encode()) <= options.budget_bytes
    tight = Page(made)
    assert whole(tight) == set()
    with_crop = {
        item["id"] for item in tight.viewer["items"] if len(item["pictures"]["mine"]["layers"]) == 2
    }
    assert "item3" in with_crop
    assert len(with_crop) < 8


def test_a_budget_below_the_thumbnails_is_an_error_with_the_way_out(evaluation: Path) -> None:
    with pytest.raises(PicturesDoNotFit, match="raise --budget-mb"):
        build(evaluation, replace(OPTIONS, budget_bytes=RESERVE + 1000))


def test_tiles_beside_the_page_cover_every_picture(evaluation: Path, tmp_path: Path) -> None:
    tiles = tmp_path / "page-tiles"
    page = build(evaluation, replace(OPTIONS, tiles=tiles))
    for item in page.viewer["items"]:
        for picture in item["pictures"].values():
            native = [layer for layer in picture["layers"] if layer["native"]]
            assert sum(layer["box"][2] * layer["box"][3] for layer in native) == 700 * 540
            for layer in native:
                with Image.open(tmp_path / layer["src"]) as tile:
                    assert list(tile.size) == layer["box"][2:]


def test_nothing_is_loaded_and_text_from_outside_stays_text(html: str, page: Page) -> None:
    assert page.loads == []
    assert "<b>prompt" not in html
    assert page.viewer["items"][0]["title"] == "<b>prompt</b> 0 & more"


def test_the_same_evaluation_gives_the_same_bytes_without_machine_paths(
    evaluation: Path, html: str
) -> None:
    options = replace(OPTIONS, workers=3)
    assert build_suite_report(evaluation, evaluation.parent, options).html == html
    assert str(evaluation.parent) not in html


def test_the_gates_decision_is_shown_with_the_reason_of_a_failed_rule(
    evaluation: Path, page: Page
) -> None:
    rule = {"name": "mine.psnr_db", "value": -3.0, "threshold": -0.5, "margin": -2.5}
    rule |= {"passed": False, "reason": "improvement -1.5 over the baseline"}
    decision = {"promoted": False, "alias": "champion", "rules": [rule], "not_compared": []}
    text = " ".join(
        build(evaluation, decision=decision | {"digests": {"vae": "0" * 64}}).text.split()
    )
    assert "Promotion gate not passed" in text
    assert "improvement -1.5 over the baseline" in text
    assert "0" * 64 in text
    assert "Promotion gate" not in page.text


def test_a_picture_that_changed_since_it_was_measured_is_refused(
    evaluation: Path, tmp_path: Path
) -> None:
    for name in ("base", "mine", "evaluation"):
        shutil.copytree(evaluation.parent / name, tmp_path / name)
    evaluation = tmp_path / "evaluation"
    (evaluation.parent / "mine" / "4.png").write_bytes(b"other")
    with pytest.raises(PictureChanged, match=r"4\.png: not the picture that was measured"):
        build(evaluation)
    (evaluation.parent / "mine" / "4.png").unlink()
    with pytest.raises(PictureChanged, match=r"4\.png: No such file"):
        build(evaluation)


def test_a_folder_without_an_evaluation_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(
        EvaluationIncomplete, match=r"metrics.json: No such file.*ultraflux evaluate"
    ):
        read_evaluation(tmp_path)


def test_an_unknown_baseline_lists_the_systems(evaluation: Path) -> None:
    with pytest.raises(ValueError, match="--baseline other: the evaluation has base, mine"):
        build(evaluation, replace(OPTIONS, baseline="other"))


def test_the_crop_is_where_both_pictures_have_detail_together() -> None:
    rng = np.random.default_rng(0)
    first, second = np.zeros((2, 600, 1700, 3), dtype=np.uint8)
    noise = rng.integers(0, 255, (100, 100, 3), dtype=np.uint8)
    first[200:300, 1100:1200] = second[210:310, 1100:1200] = noise
    assert crop_box([first, second]) == (0, 1024, 512, 512)
    assert crop_box([first[:400, :300]]) == (0, 0, 400, 300)


def test_the_page_answers_first_with_the_best_in_bold_and_a_forest(html: str) -> None:
    answer = html.index("mine against base over 8 prompts: ")
    assert answer < html.index('<section id="summary">')
    assert html[answer:].split("<")[0].endswith("at 5% over the whole page.")
    # SSIM of the base is 0.9 everywhere, that of the other 0.86 on the mean.
    assert "<strong>0.900</strong>" in html
    assert "<strong>0.861</strong>" not in html
    forest = html[html.index('class="panel forest"') :].split("</svg>")[0]
    # Seven of eight PSNR differences are equal, so that interval has no end to draw.
    assert forest.count("<circle") == 1


def test_numbers_leave_as_csv_and_latex(evaluation: Path) -> None:
    import csv as csv_module
    import io as io_module

    from components.evaluation.pages.suite_tables import metric_tables
    from components.evaluation.pages.table_export import as_csv, as_latex

    read = read_evaluation(evaluation)
    rows = list(csv_module.DictReader(io_module.StringIO(as_csv(read))))
    (found,) = [r for r in rows if (r["system"], r["metric"]) == ("base", "psnr_db")]
    assert float(found["value"]) == read.metrics["base.psnr_db"]
    assert float(found["low"]) == read.metrics["base.psnr_db_low"]
    assert found["protocol"] == "psnr/rgb8/v1"
    tables = as_latex(metric_tables(read))
    assert r"\textbf{0.900}" in tables
    assert tables.count(r"\begin{tabular}") == tables.count(r"\end{tabular}") >= 1
    assert r"SSIM $\uparrow$" in tables
    assert r"Not comparable: " in tables


@pytest.mark.parametrize("systems", [["base"], ["base", "mine"]])
def test_a_metric_that_is_infinite_is_said_to_be_not_compared(
    evaluation: Path, systems: list[str]
) -> None:
    read = read_evaluation(evaluation)
    table = read.table.assign(prompt=read.table["item"])
    table.loc[table["system"].isin(systems) & (table["metric"] == "psnr_db"), "value"] = math.inf
    assert [c.id for c in replace(read, table=table).image_metrics] == ["psnr_db", "ssim"]
    (one,) = against_baseline(table, ("base", "mine"), "base", resamples=200, seed=0)
    (refusal,) = one.refusals
    assert "a value that is not finite cannot be averaged away" in refusal.reason
    part = Paired("mine", tuple((c, "") for c in one.comparisons), (), one.refusals)
    assert verdict_sentence(part, "base").endswith("over the whole page; not compared: PSNR.")


def test_the_page_says_how_large_it_is(html: str) -> None:
    (said,) = re.findall(r"This file: ([\d.]+) MB\.</footer>", html)
    assert float(said) == pytest.approx(len(html.encode()) / 1e6, abs=0.051)
    assert "@size@" not in html[html.rindex("<footer>") :]
