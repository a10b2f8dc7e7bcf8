from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from components.corpus.manifest import SCHEMA, write_table
from components.settings.schema import Settings, load_settings
from components.telemetry.metric_log import MetricLog
from flows.stages import validate as validate_stage
from flows.stages.contract import StageContext, StageFailed
from flows.stages.gate import check_manifest
from flows.validation import (
    Contract,
    ContractError,
    ValidationReport,
    columns_read,
    load_contract,
    to_html,
    to_json,
    validate,
)

ROOT = Path(__file__).parents[2]
NAMES = ("raw", "scored", "released")
FOLDER = ROOT / "data" / "contracts"


@pytest.fixture(autouse=True)
def _no_analytics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GX_ANALYTICS_ENABLED", "false")


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load_settings(ROOT / "params.yaml")


def manifest(count: int = 4) -> pd.DataFrame:
    rows = [
        {
            "image_id": f"{n:064x}",
            "uri": f"photos/{n}.jpg",
            "width": 3840,
            "height": 2160,
            "megapixels": 8.2944,
            "aspect_ratio": 16 / 9,
            "bucket": "3072x5440",
            "format": "JPEG",
            "source": "folder",
            "bytes_per_pixel": 0.5,
            "integrity": "ok",
            "flat_fraction": 0.25,
            "entropy_bits": 7.5,
            "quality_score": 0.8,
            "quality_scorer": "test",
            "aesthetic": 0.5,
            "aesthetic_scorer": "test",
            "channel": "general",
            "caption_en": "a lake",
            "caption_zh": "湖",
            "caption_status": "ok",
            "license": "CC0-1.0",
            "photographer": "A. Adams",
            "kept": True,
            "reject_reason": None,
        }
        for n in range(count)
    ]
    # One candidate that was rejected: rules for kept rows do not apply to it.
    rows.append(
        rows[0]
        | {
            "image_id": "f" * 64,
            "uri": "photos/rejected.jpg",
            "entropy_bits": 3.0,
            "kept": False,
            "reject_reason": "entropy",
        }
    )
    frame = pd.DataFrame(rows)
    return frame.reindex(columns=SCHEMA.names)


def contracts(*names: str) -> list[Contract]:
    return [load_contract(FOLDER / f"{name}.yaml") for name in names or NAMES]


def failed(report: ValidationReport) -> list[tuple[str, str | None, str]]:
    return [
        (outcome.expectation, outcome.column, outcome.severity)
        for outcome in report.outcomes
        if outcome.status == "failed"
    ]


def test_a_good_manifest_keeps_the_contract_and_null_settings_are_skipped(
    settings: Settings,
) -> None:
    report = validate(manifest(), contracts(), settings)
    assert failed(report) == []
    skipped = [(o.column, o.rows) for o in report.outcomes if o.status == "skipped"]
    assert skipped == [
        ("flat_fraction", "human"),
        ("quality_score", "general"),
        ("quality_score", "human"),
        ("nsfw_score", "kept"),
        ("drawing_score", "kept"),
    ]
    assert list(dict.fromkeys(o.contract for o in report.outcomes)) == list(NAMES)


def test_each_channel_answers_to_its_own_thresholds(settings: Settings) -> None:
    frame = manifest()
    frame.loc[[1, 2], "flat_fraction"] = 0.9
    frame.loc[1, "channel"] = "human"
    (outcome,) = validate(frame, contracts(), settings).failures("critical")
    assert (outcome.column, outcome.rows) == ("flat_fraction", "general")
    assert [row["uri"] for row in outcome.examples] == ["photos/2.jpg"]


@pytest.mark.parametrize(
    ("row", "change", "expected"),
    [
        (1, {"integrity": "cut off"}, ("expect_column_values_to_be_in_set", "integrity")),
        (1, {"entropy_bits": 6.9}, ("expect_column_values_to_be_between", "entropy_bits")),
        (1, {"flat_fraction": 0.51}, ("expect_column_values_to_be_between", "flat_fraction")),
        (1, {"flat_fraction": None}, ("expect_column_values_to_not_be_null", "flat_fraction")),
        (1, {"image_id": "xyz"}, ("expect_column_values_to_match_regex", "image_id")),
        (1, {"caption_en": None}, ("expect_column_values_to_not_be_null", "caption_en")),
        (1, {"channel": "robots"}, ("expect_column_values_to_be_in_set", "channel")),
        (4, {"reject_reason": "mood"}, ("expect_column_values_to_be_in_set", "reject_reason")),
    ],
)
def test_every_critical_breach_is_found_in_its_row(
    settings: Settings, row: int, change: dict[str, object], expected: tuple[str, str]
) -> None:
    frame = manifest()
    for column, value in change.items():
        frame.loc[row, column] = value
    report = validate(frame, contracts(), settings)
    assert failed(report) == [(*expected, "critical")]
    (outcome,) = report.failures("critical")
    assert outcome.failed_rows["uri"].to_pylist() == [frame["uri"][row]]


def test_duplicate_images_and_an_empty_corpus_are_critical(settings: Settings) -> None:
    frame = manifest()
    frame.loc[2, "image_id"] = frame["image_id"][1]
    report = validate(frame, contracts(), settings)
    (outcome,) = report.failures("critical")
    assert set(outcome.failed_rows["uri"].to_pylist()) == {"photos/1.jpg", "photos/2.jpg"}
    empty = manifest(1).iloc[1:]
    report = validate(empty, contracts(), settings)
    assert failed(report) == [("expect_table_row_count_to_be_between", None, "critical")]


def test_a_missing_column_is_named(settings: Settings) -> None:
    frame = manifest().drop(columns="caption_zh")
    report = validate(frame, contracts(), settings)
    (outcome,) = report.failures("warning")
    assert outcome.observed == "column 'caption_zh' is missing"


def test_results_are_the_same_bytes_twice_and_the_page_needs_nothing_from_outside(
    settings: Settings,
) -> None:
    frame = manifest()
    frame.loc[0, "license"] = None
    frame.loc[1, "uri"] = "photos/<script>.jpg"
    frame.loc[1, "integrity"] = "bad"
    texts = []
    for _ in range(2):
        report = validate(frame, contracts(), settings)
        texts.append((to_json(report), to_html(report)))
    assert texts[0] == texts[1]
    document = json.loads(texts[0][0])
    assert document["critical_failures"] == document["warning_failures"] == 1
    assert not document["success"]
    page = texts[0][1]
    assert not re.search(r"<script|src=|href=|url\(|https?:", page)
    assert "&lt;script&gt;.jpg" in page


def context(root: Path, settings: Settings) -> StageContext:
    return StageContext(
        stage="validate",
        settings=settings,
        root=root,
        state_dir=root / "runs",
        metrics=MetricLog(root / "runs" / "metrics.jsonl"),
    )


def prepared(root: Path, frame: pd.DataFrame) -> Path:
    write_table(frame, root / "data" / "caption" / "manifest.parquet")
    shutil.copytree(FOLDER, root / "data" / "contracts")
    return root / "data" / "validate"


def test_the_stage_passes_with_a_warning_that_names_the_row(
    tmp_path: Path, settings: Settings
) -> None:
    frame = manifest()
    frame.loc[3, "license"] = None
    folder = prepared(tmp_path, frame)
    result = validate_stage.run(context(tmp_path, settings))
    assert result.metrics["warning_failures"] == 1.0
    assert "photos/3.jpg" in result.summary
    rows = pq.read_table(folder / "failed_rows.parquet").to_pylist()
    assert [(row["column"], row["severity"], row["uri"]) for row in rows] == [
        ("license", "warning", "photos/3.jpg")
    ]


def test_a_critical_breach_stops_the_stage_after_the_report_was_written(
    tmp_path: Path, settings: Settings
) -> None:
    frame = manifest()
    frame.loc[2, "entropy_bits"] = 1.5
    folder = prepared(tmp_path, frame)
    with pytest.raises(StageFailed) as caught:
        validate_stage.run(context(tmp_path, settings))
    line = str(caught.value)
    assert "\n" not in line
    for part in ("expect_column_values_to_be_between", "entropy_bits", "photos/2.jpg", "1.5"):
        assert part in line
    assert json.loads((folder / "results.json").read_text())["critical_failures"] == 1
    assert "photos/2.jpg" in (folder / "report.html").read_text()
    assert pq.read_table(folder / "failed_rows.parquet").num_rows == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expectation": "expect_column_values_to_be_uniqe"}, "did you mean .*to_be_unique"),
        ({"arguments": {"nonsense": 1}}, "nonsense"),
        ({"arguments": {"mostly": {"setting": "select.colour"}}}, "no setting 'select.colour'"),
    ],
)
def test_an_unusable_expectation_is_one_clear_error(
    settings: Settings, change: dict[str, object], message: str
) -> None:
    entry = {
        "expectation": "expect_column_values_to_be_unique",
        "column": "uri",
        "severity": "critical",
        "why": "because",
    }
    contract = Contract.model_validate(
        {"version": 1, "name": "test", "expectations": [entry | change]}
    )
    with pytest.raises(ContractError, match=message):
        validate(manifest(), [contract], settings)


def test_a_broken_contract_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"none\.yaml: contract not found; .*params\.yaml"):
        load_contract(tmp_path / "none.yaml")
    path = tmp_path / "c.yaml"
    path.write_text("version: [")
    with pytest.raises(ContractError, match=r"c\.yaml: not YAML"):
        load_contract(path)
    document = yaml.safe_load((FOLDER / "released.yaml").read_text())
    document["expectations"][0]["severity"] = "fatal"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(ContractError, match=r"c\.yaml: expectations\.0\.severity"):
        load_contract(path)


def gated(stage: str, root: Path, settings: Settings, contract: str) -> StageContext:
    """A stage of a project whose manifest and contract are in place."""
    shutil.copytree(FOLDER, root / "data" / "contracts", dirs_exist_ok=True)
    (root / "data" / "contracts" / "own.yaml").write_text(contract)
    return replace(context(root, settings), stage=stage)


def test_before_selection_every_readable_row_counts_as_kept(settings: Settings) -> None:
    frame = manifest().assign(kept=None, reject_reason=None)
    frame.loc[1, ["integrity", "format"]] = ["too large", None]
    frame.loc[2, "bytes_per_pixel"] = -1.0
    (outcome,) = validate(frame, contracts("raw"), settings).failures("critical")
    assert (outcome.column, outcome.checked) == ("bytes_per_pixel", 4)
    assert [row["uri"] for row in outcome.examples] == ["photos/2.jpg"]


def test_a_gate_reads_named_columns_only_and_its_report_goes_with_the_error(
    tmp_path: Path, settings: Settings
) -> None:
    own = """\
version: 1
name: own
expectations:
  - expectation: expect_column_values_to_be_in_set
    column: license
    arguments: {value_set: [CC0-1.0]}
    severity: critical
    rows: all
    why: Ours alone.
"""
    stage = gated("select", tmp_path, settings, own)
    path = stage.output_dir / "manifest.parquet"
    frame = manifest()
    write_table(frame, path)
    checked = check_manifest(stage, path, ["data/contracts/own.yaml"], "contract_")
    assert checked.metrics["contract_passed"] == 1.0
    assert columns_read([load_contract(tmp_path / "data/contracts/own.yaml")])[-1] == "license"

    frame.loc[3, "license"] = "all rights reserved"
    write_table(frame, path)
    with pytest.raises(StageFailed, match=r"^select: 1 critical.* own .*photos/3\.jpg") as caught:
        check_manifest(stage, path, ["data/contracts/own.yaml"], "contract_")
    assert str(caught.value).endswith(
        "see data/select/contract_report.html and contract_failed_rows.parquet"
    )
    assert [file.name for file in caught.value.found.artifacts] == [
        "contract_results.json",
        "contract_report.html",
        "contract_failed_rows.parquet",
    ]
    assert all(file.is_file() for file in caught.value.found.artifacts)
    assert caught.value.found.metrics["contract_critical_failures"] == 1.0
    page = (stage.output_dir / "contract_report.html").read_text()
    assert "all rights reserved" in page


def test_whole_numbers_of_every_width_are_compared_alike(settings: Settings) -> None:
    for dtype in ("int32", "int64", "uint16", "float64"):
        frame = manifest().astype({"width": dtype})
        frame.loc[1, "width"] = 0
        (outcome,) = validate(frame, contracts("raw"), settings).failures("critical")
        assert (outcome.column, outcome.failed_rows["uri"].to_pylist()) == (
            "width",
            ["photos/1.jpg"],
        )


@pytest.mark.parametrize(
    ("stage", "names"),
    [("ingest", ["raw"]), ("select", ["scored"]), ("validate", list(NAMES))],
)
def test_dvc_tracks_each_contract_where_it_is_checked_and_the_settings_it_looks_up(
    stage: str, names: list[str]
) -> None:
    declared = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]
    assert {dep for dep in declared["deps"] if dep.startswith("${validation.")} == {
        f"${{validation.{name}}}" for name in names
    }
    looked_up = {
        value["setting"]
        for contract in contracts(*names)
        for spec in contract.expectations
        for value in spec.arguments.values()
        if isinstance(value, dict)
    }
    for setting in looked_up:
        parts = setting.split(".")
        assert {".".join(parts[: n + 1]) for n in range(len(parts))} & set(declared["params"])


def test_the_contract_knows_every_reason_that_a_rule_can_give(root: Path) -> None:
    """A reason that it did not know stopped `corpus forget --rebuild` at the stage `select`."""
    from components.corpus.selection.rules import REASONS

    contract = yaml.safe_load((root / "data/contracts/scored.yaml").read_text(encoding="utf-8"))
    (reasons,) = (
        entry["arguments"]["value_set"]
        for entry in contract["expectations"]
        if entry.get("column") == "reject_reason" and "arguments" in entry
    )
    # The stage `caption` rejects by a rule of its own.
    assert sorted(reasons) == sorted((*REASONS, "caption"))
