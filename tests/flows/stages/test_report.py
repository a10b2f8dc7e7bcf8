"""The report page: self-contained, escaped, deterministic, and complete over partial runs."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from components.evaluation.measuring.twin_scores import Twin
from components.evaluation.pages.report import build_report
from components.evaluation.pages.report_page import SCRIPTS, STYLES, assets
from components.evaluation.statistics import gate, scores
from components.settings.schema import Settings, load_settings

ROOT = Path(__file__).resolve().parents[3]
ATTACK = '<script>alert("x")</script> & "quoted"'


def picture(seed: int, height: int = 48, width: int = 64) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_corpus(data: Path) -> None:
    buffer = io.BytesIO()
    picture(0).save(buffer, "JPEG")
    common = {"width": 64, "height": 48, "flat_fraction": 0.25, "entropy_bits": 7.5}
    rows = [
        common
        | {"image_id": "a", "uri": "p/a.jpg", "kept": True, "caption_en": ATTACK}
        | {"caption_zh": "山间湖泊", "photographer": ATTACK, "license": "CC0-1.0"},
        common
        | {"image_id": "b", "uri": f"p/{ATTACK}.jpg", "kept": False, "caption_en": None}
        | {"reject_reason": "flatness", "reject_value": 0.8, "reject_threshold": 0.5},
        {"image_id": "c", "uri": "p/c.jpg", "kept": None, "reject_reason": "unreadable"},
    ]
    table = pd.DataFrame(rows)
    for folder in ("caption", "signals", "slices"):
        (data / folder).mkdir(parents=True)
    table.to_parquet(data / "caption" / "manifest.parquet", index=False)
    pd.DataFrame({"image_id": ["a", "b"], "jpeg": [buffer.getvalue()] * 2}).to_parquet(
        data / "signals" / "derivatives.parquet", index=False
    )


def write_training(data: Path) -> None:
    (data / "vae" / "crops").mkdir(parents=True)
    for kind in ("original", "before", "after"):
        picture(1, 32, 32).save(data / "vae" / "crops" / f"00_{kind}.png")
    steps = list(range(60))
    history = {
        "step": steps,
        "loss": [1 / (s + 1) for s in steps],
        "psnr_db": [20.0 + s for s in steps],
    }
    pd.DataFrame(history).to_csv(data / "vae" / "history.csv", index=False)
    for stage in (1, 2):
        folder = data / f"dit_stage{stage}"
        folder.mkdir()
        pd.DataFrame(history).to_csv(folder / "history.csv", index=False)
        pd.DataFrame(
            [(s, "raw", level, 1 / (s + 1)) for s in (0, 10) for level in (0.25, 0.75)],
            columns=["step", "weights", "level", "loss"],
        ).to_csv(folder / "validation.csv", index=False)


def write_samples(data: Path) -> None:
    (data / "generate" / "images").mkdir(parents=True)
    picture(2, 32, 64).save(data / "generate" / "images" / "x.png")
    record = {"prompt": ATTACK, "file": "x.png", "seed": 5, "height": 32, "width": 64}
    line = json.dumps(record | {"image_sha256": "f" * 64})
    (data / "generate" / "generations.jsonl").write_text(line + "\n")


def write_twins(data: Path) -> None:
    (data / "generate" / "twins").mkdir()
    lines = []
    for image_id, file in (("a", "own.png"), ("a", "other.png"), ("b", "own2.png")):
        picture(3, 32, 64).save(data / "generate" / "twins" / file)
        record = {"source_image_id": image_id, "file": file, "prompt": ATTACK, "seed": 5}
        lines.append(json.dumps(record | {"height": 32, "width": 64, "image_sha256": "e" * 64}))
    (data / "generate" / "twins" / "twins.jsonl").write_text("\n".join(lines) + "\n")
    uris = {"image_id": ["a", "b"], "uri": ["p/a.jpg", f"p/{ATTACK}.jpg"]}
    pd.DataFrame(uris).to_parquet(data / "slices" / "stage1.parquet")


def write_contract(data: Path) -> None:
    entry = {"expectation": "expect_column_values_to_not_be_null", "column": "uri"}
    entry |= {"severity": "critical", "status": "passed", "why": ATTACK, "observed": None}
    failed = entry | {"status": "failed", "severity": "warning", "unexpected": 2, "checked": 7}
    document = {"success": True, "expectations": [entry, failed]}
    (data / "validate").mkdir()
    (data / "validate" / "results.json").write_text(json.dumps(document))
    (data / "validate" / "report.html").write_text("<p>page</p>")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    write_corpus(data)
    write_contract(data)
    write_training(data)
    write_samples(data)
    return tmp_path


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load_settings(ROOT / "params.yaml")


TWINS = (Twin("a", "own.png", 21.26, True), Twin("b", "own2.png", 9.0, False))


def render(root: Path, settings: Settings, twins: Sequence[Twin] = ()) -> str:
    rows = [
        *scores.image_scores("a", scores.RECONSTRUCTION_BEFORE, (32, 64), {"psnr_db": 20.0}),
        *scores.image_scores("b", scores.RECONSTRUCTION_BEFORE, (32, 64), {"psnr_db": 21.0}),
        *scores.image_scores("a", scores.RECONSTRUCTION_AFTER, (32, 64), {"psnr_db": 25.0}),
        *scores.image_scores("b", scores.RECONSTRUCTION_AFTER, (32, 64), {"psnr_db": 26.0}),
        *scores.image_scores("x.png", scores.GENERATED, (32, 64), {"glcm_score": None}),
    ]
    table = scores.scores_table(rows)
    metrics = scores.headline_metrics(table, resamples=200, seed=0) | {"validation_loss_drop": 0.3}
    decision = gate.decide(metrics, settings.promote, {"transformer": "0" * 64})
    return build_report(
        root, settings, table=table, metrics=metrics, decision=decision, twins=twins
    )


class Page(HTMLParser):
    """Collects tags, their resource attributes and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.resources: list[str] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append(dict(attrs).get("type") or "runs")
        self.resources += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "poster")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_nothing_is_fetched_from_a_network(root: Path, settings: Settings) -> None:
    html = render(root, settings)
    page = Page(html)
    assert page.resources
    for resource in page.resources:
        assert re.match(r"data:image/(png|jpeg);base64,|#|\.\./validate/", resource), resource[:80]
    # Cards name addresses of weights as text; nothing that loads names one.
    assert not re.search(r"url\s*\(|@import", html)
    assert not re.search(r"https?:|fetch\(|XMLHttp", assets([*STYLES, *SCRIPTS]))
    # The three crops are the same picture here, which is embedded once.
    assert page.scripts == ["application/json", "runs", "image/png"]


def test_text_from_outside_is_escaped(root: Path, settings: Settings) -> None:
    html = render(root, settings)
    assert ATTACK not in html
    assert "<script>alert" not in html
    text = "".join(Page(html).text)
    # Caption, photographer, prompt and the reasons of two expectations show it as text.
    assert text.count('<script>alert("x")') == 5
    assert "山间湖泊" in text


def test_photographs_and_their_twins_come_first_and_say_what_they_prove(
    root: Path, settings: Settings
) -> None:
    write_twins(root / "data")
    html = render(root, settings, TWINS)
    assert ATTACK not in html
    assert html.index('id="twins"') < html.index('id="samples"') < html.index('id="corpus"')
    section = html[html.index('id="twins"') : html.index('id="samples"')]
    # Two photographs, two twins, one more size of the first caption.
    assert section.count("<img src=") == 5
    text = " ".join("".join(Page(section).text).split())
    assert "a.jpg recognised, 21.3 dB" in text
    assert "another photograph is nearer, 9.0 dB" in text
    assert "These pictures were memorised" in text
    assert 'id="twins"' not in render(root, settings)


def test_a_second_build_gives_the_same_bytes_without_machine_paths(
    root: Path, settings: Settings
) -> None:
    html = render(root, settings)
    assert render(root, settings) == html
    assert str(root) not in html


def test_rejections_show_value_and_threshold_and_unjudged_rows_count_as_rejected(
    root: Path, settings: Settings
) -> None:
    text = " ".join("".join(Page(render(root, settings)).text).split())
    assert "flatness: 0.8 against 0.5" in text
    assert "3 candidates, 1 accepted, 2 rejected" in text
    assert "unreadable" in text


def test_the_contracts_result_names_what_failed_and_links_its_page(
    root: Path, settings: Settings
) -> None:
    html = render(root, settings)
    assert 'href="../validate/report.html"' in html
    text = " ".join("".join(Page(html).text).split())
    assert "1 of 2 expectations hold" in text
    assert "uri: column values to not be null" in text
    assert "2 of 7 rows" in text


def test_every_section_link_has_its_target(root: Path, settings: Settings) -> None:
    html = render(root, settings)
    links = re.findall(r'href="#(\w+)"', html)
    assert {"corpus", "training", "autoencoder", "samples", "metrics", "images"} <= set(links)
    for link in links:
        assert f'id="{link}"' in html
    assert html.count("<svg") == 8


def test_metrics_without_weights_say_how_to_get_them(root: Path, settings: Settings) -> None:
    text = "".join(Page(render(root, settings)).text)
    assert "weights missing" in text
    assert "hf download openai/clip-vit-large-patch14" in text
    assert "UltraFlux-F16-VAE" in text
    assert "not comparable" in text


def test_a_report_over_an_empty_run_is_still_a_page(tmp_path: Path, settings: Settings) -> None:
    html = build_report(
        tmp_path,
        settings,
        table=scores.scores_table([]),
        metrics={},
        decision=gate.decide({}, settings.promote),
    )
    assert "not measured" in html
    assert 'id="corpus"' not in html
