from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from components.corpus.manifest import read_table
from components.settings.schema import Settings, load_settings, parse_settings
from components.telemetry.metric_log import MetricLog
from flows.stages.contract import StageContext, StageFailed, StageResult

ROOT = Path(__file__).parents[3]
MEASURING = ("source", "ingest", "signals", "quality", "people", "select", "caption", "slices")


def adjusted(**sections: dict[str, object]) -> Settings:
    """The committed settings over a folder of small synthetic photographs."""
    values = load_settings(ROOT / "params.yaml").model_dump(mode="json")
    contracts = ROOT / "data" / "contracts"
    values["validation"] = {n: str(contracts / f"{n}.yaml") for n in values["validation"]}
    values["ingest"] |= {"source": "photos", "attribution": None}
    values["select"] |= {
        "min_pixels": 300 * 300,
        "exclusions": str(ROOT / "conf" / "exclusions.csv"),
    }
    values["caption"] |= {"min_words": 2}
    values["people"] |= {"boxes": None}
    values["signals"] |= {"timeout_s": 60.0}
    for name, changes in sections.items():
        values[name] |= changes
    return parse_settings(values)


def run(stage: str, root: Path, settings: Settings) -> StageResult:
    state = root / "runs" / stage
    context = StageContext(stage, settings, root, state, MetricLog(state / "metrics.jsonl"))
    return importlib.import_module(f"flows.stages.{stage}").run(context)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven stages over good, copied, damaged, flat, small and caption-less files."""
    root = tmp_path_factory.mktemp("project")
    photos = root / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for n in range(6):
        pixels = rng.integers(0, 256, (300, 300 + 60 * n, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"good-{n}.png")
    shutil.copy(photos / "good-0.png", photos / "copy.png")
    (photos / "cut.png").write_bytes((photos / "good-1.png").read_bytes()[:30000])
    (photos / "empty.jpg").touch()
    Image.new("RGB", (400, 400), "teal").save(photos / "flat.png")
    Image.new("RGB", (50, 50), "teal").save(photos / "small.png")
    with (photos / "captions.jsonl").open("w") as file:
        for n in range(5):
            record = {"file": f"good-{n}.png", "caption_en": "coloured noise", "caption_zh": "噪声"}
            file.write(json.dumps(record) + "\n")
    for stage in MEASURING:
        run(stage, root, adjusted())
    return root


def test_rows_of_the_attribution_that_name_nothing_are_said_by_ingest(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 40), "teal").save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "list.csv").write_text("file,author\na.png,Ann\nb.png,Bo\n")
    settings = adjusted(ingest={"attribution": "list.csv"})
    for stage in ("source", "ingest"):
        result = run(stage, tmp_path, settings)
    assert result.summary.startswith(
        "1 candidates, 0 unreadable, 0 duplicates; list.csv: 1 row names no photograph of the "
        "source, such as 'b.png'"
    )


def test_every_file_ends_as_a_row_with_its_verdict(project: Path) -> None:
    table = read_table(project / "data" / "slices" / "manifest.parquet")
    verdicts = {Path(row.uri).name: row.reject_reason for row in table.itertuples()}
    assert {name: reason for name, reason in verdicts.items() if pd.notna(reason)} == {
        # In path order the copy comes first and is the original; its caption is the other's.
        "good-0.png": "duplicate",
        "cut.png": "integrity",
        "empty.jpg": "integrity",
        "flat.png": "flat_fraction",
        "small.png": "resolution",
        "good-5.png": "caption",
    }
    assert table.loc[table["kept"], "split"].value_counts().to_dict() == {"eval": 3, "train": 2}
    cut = table[table["uri"] == "photos/cut.png"].iloc[0]
    assert cut["integrity"].startswith("cannot decode")
    derivatives = pq.read_table(project / "data" / "signals" / "derivatives.parquet").to_pandas()
    assert derivatives["jpeg"].notna().sum() == 8


def test_running_a_stage_again_gives_the_same_bytes_with_any_number_of_workers(
    project: Path,
) -> None:
    for stage in ("signals", "quality"):
        folder = project / "data" / stage
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        shutil.rmtree(folder)
        shutil.rmtree(project / "runs" / stage)
        run(stage, project, adjusted(runtime={"workers": 1}))
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def copied(project: Path, root: Path) -> Path:
    shutil.copytree(project / "data", root / "data")
    shutil.copytree(project / "photos", root / "photos")
    return root


def test_when_nothing_passes_one_line_counts_reasons_and_names_the_setting(
    project: Path, tmp_path: Path
) -> None:
    root = copied(project, tmp_path)
    with pytest.raises(
        StageFailed, match=r"none of 11 .*resolution 8.*select\.min_pixels"
    ) as caught:
        run("select", root, adjusted(select={"min_pixels": 10**9}))
    assert "\n" not in str(caught.value)
    assert json.loads((root / "data" / "select" / "summary.json").read_text())["kept"] == 0


def test_without_usable_captions_one_line_names_images(project: Path, tmp_path: Path) -> None:
    root = copied(project, tmp_path)
    (root / "photos" / "captions.jsonl").write_text("")
    with pytest.raises(StageFailed, match=r"none of 6 selected .*copy\.png: missing"):
        run("caption", root, adjusted())


def test_without_training_images_one_line_names_the_setting(project: Path, tmp_path: Path) -> None:
    root = copied(project, tmp_path)
    with pytest.raises(StageFailed, match=r"5 kept images.*slices\.eval_min_images \(5\)"):
        run("slices", root, adjusted(slices={"eval_min_images": 5}))


def test_an_empty_folder_is_one_line_that_names_folder_and_setting(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(StageFailed, match=r"^source: photos: no files.*ingest\.source"):
        run("source", tmp_path, adjusted())


def test_a_missing_input_names_the_stage_that_makes_it(tmp_path: Path) -> None:
    for stage in MEASURING[1:]:
        with pytest.raises(StageFailed, match="is missing; run the stage"):
            run(stage, tmp_path, adjusted())


def test_scores_made_elsewhere_reach_the_manifest_under_their_scorer(
    project: Path, tmp_path: Path
) -> None:
    root = copied(project, tmp_path)
    ids = pq.read_table(root / "data" / "quality" / "quality.parquet")["image_id"].to_pylist()
    scores = pd.DataFrame(
        {
            "image_id": ids,
            "quality": np.linspace(3, 5, len(ids)),
            "quality_scorer": "q-align",
            "aesthetic": np.linspace(10, 90, len(ids)),
            "aesthetic_scorer": "artimuse",
        }
    )
    scores.to_csv(root / "scores.csv", index=False)
    settings = adjusted(
        quality={"scorer": "table", "scores": "scores.csv"}, select={"min_quality": 4.0}
    )
    run("quality", root, settings)
    run("select", root, settings)
    table = read_table(root / "data" / "select" / "manifest.parquet")
    assert (table.loc[table["kept"], "qalign"] > 4.0).all()
    assert (table["reject_reason"] == "quality").any()

    scores.iloc[1:].to_csv(root / "scores.csv", index=False)
    with pytest.raises(StageFailed, match=r"quality\.scores: scores\.csv: 1 of .* have no row"):
        run("quality", root, settings)


def test_a_worker_failure_is_the_integrity_of_its_row(project: Path, tmp_path: Path) -> None:
    root = copied(project, tmp_path)
    path = root / "data" / "signals" / "signals.parquet"
    signals = pq.read_table(path)
    frame = signals.to_pandas()
    frame.loc[0, ["integrity", "flat_fraction", "entropy_bits"]] = None
    frame.loc[0, "error"] = "quarantined: worker killed by SIGKILL"
    frame.to_parquet(path, index=False)
    run("select", root, adjusted())
    table = read_table(root / "data" / "select" / "manifest.parquet")
    row = table[table["image_id"] == frame["image_id"][0]].iloc[0]
    assert row["integrity"] == "quarantined: worker killed by SIGKILL"
    assert row["reject_reason"] == "integrity"


def test_a_recompressed_copy_is_a_near_duplicate_of_the_photograph_with_more_pixels(
    tmp_path: Path,
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "captions.jsonl").touch()
    for name in ("red-cherry-leaves", "vents-du-sud"):
        with Image.open(ROOT / "data" / "sample" / f"{name}.jpg") as image:
            image.draft("RGB", (1400, 1000))
            image.resize((1024, 700)).save(photos / f"{name}.png")
            image.resize((960, 656)).save(photos / f"{name}-again.jpg", quality=60)
    # Exact copies share an image_id; they must not disturb the search.
    shutil.copy(photos / "vents-du-sud.png", photos / "z-copy.png")
    settings = adjusted(
        select={
            "near_duplicate_distance": 31,
            "near_duplicate_min_quality": 50,
            "min_entropy_bits": 1.0,
            "max_flat_fraction": 1.0,
        }
    )
    for stage in ("source", "ingest", "signals", "quality", "people", "select"):
        run(stage, tmp_path, settings)
    table = read_table(tmp_path / "data" / "select" / "manifest.parquet")
    verdicts = {Path(row.uri).name: row.reject_reason for row in table.itertuples()}
    assert verdicts.pop("z-copy.png") == "duplicate"
    assert {name: reason for name, reason in verdicts.items() if pd.notna(reason)} == {
        "red-cherry-leaves-again.jpg": "near_duplicate",
        "vents-du-sud-again.jpg": "near_duplicate",
    }
    ids = table.set_index("uri")["image_id"]
    row = table[table["uri"] == "photos/vents-du-sud-again.jpg"].iloc[0]
    assert row["duplicate_of"] == ids["photos/vents-du-sud.png"]
    assert table["pdq_hash"].notna().all()
    assert table["glcm_score"].notna().all()
