from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.corpus.folder_survey import advice, propose, survey, survivors
from components.settings.schema import Settings, load_settings

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def params() -> Settings:
    return load_settings(ROOT / "params.yaml")


def write(path: Path, *, edge: int = 300, flat: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(0, 256, (edge, edge, 3), np.uint8)
    Image.fromarray(noise if not flat else noise // 200).save(path)


def look(folder: Path):  # type: ignore[no-untyped-def]
    return survey(folder, attribution="ATTRIBUTION.csv", captions="captions.jsonl")


def test_every_picture_is_counted_and_what_is_not_listed_is_proposed(
    tmp_path: Path, params: Settings
) -> None:
    for name in ("a.jpg", "B.JPEG", "c.bmp", "below/d.gif", "e.png"):
        write(tmp_path / name)
    (tmp_path / "f.heic").write_bytes(b"x")
    (tmp_path / "g.jpg").write_bytes(b"no picture")
    (tmp_path / "notes.md").touch()
    (tmp_path / "a.txt").write_text("a")
    found = look(tmp_path)
    endings = {".jpg": 2, ".jpeg": 1, ".bmp": 1, ".gif": 1, ".png": 1, ".heic": 1}
    assert found.endings == endings
    assert (found.photographs, found.nested, found.caption_files) == (6, True, 1)
    few = params.ingest.model_copy(update={"extensions": (".jpg",), "recursive": False})
    proposal = propose(found, params.model_copy(update={"ingest": few}), "photos")
    ingest = proposal.settings["ingest"]
    assert set(ingest["extensions"]) == {".jpg", ".jpeg", ".bmp", ".gif", ".png"}
    assert ingest["recursive"] is True
    assert ingest["attribution"] is None
    said = "\n".join(proposal.remarks)
    assert "not read: 1 .heic" in said
    assert "1 of 6 files that were looked at cannot be read, such as g.jpg: not an image" in said
    assert "no captions.jsonl; 1 text files lie beside" in said


def test_a_size_rule_far_above_the_training_size_is_lowered_with_a_word(
    tmp_path: Path, params: Settings
) -> None:
    write(tmp_path / "a.png", edge=900)
    proposal = propose(look(tmp_path), params, "photos")
    target = params.buckets.target_pixels
    assert target is not None
    assert proposal.settings["select"] == {"min_pixels": 4 * target}
    assert any("1 of 1 photographs have fewer than 8,294,400 pixels" in r for r in proposal.remarks)
    # Where the paper's sizes are trained the paper's rule stays, and is said.
    buckets = params.buckets.model_copy(update={"target_pixels": None})
    proposal = propose(look(tmp_path), params.model_copy(update={"buckets": buckets}), "photos")
    assert "select" not in proposal.settings
    assert any("will be rejected" in remark for remark in proposal.remarks)
    small = params.select.model_copy(update={"min_pixels": 1})
    proposal = propose(look(tmp_path), params.model_copy(update={"select": small}), "photos")
    assert not any("min_pixels" in remark for remark in proposal.remarks)


def test_captions_outside_the_bounds_move_them(tmp_path: Path, params: Settings) -> None:
    for name in ("a.png", "b.png"):
        write(tmp_path / name)
    lines = [json.dumps({"file": "a.png", "caption_en": "word " * 12}), "[]", "{"]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    proposal = propose(look(tmp_path), params, "photos")
    assert proposal.settings["caption"] == {"min_words": 12}
    assert any("1 captions for 2 photographs" in remark for remark in proposal.remarks)


def test_survivors_follow_the_rules_and_advice_names_what_would_keep_more(
    tmp_path: Path, params: Settings
) -> None:
    for name in ("a.png", "bb.png", "ccc.png"):
        write(tmp_path / name, flat=name != "a.png")
    (tmp_path / "dddd.png").write_bytes(b"")
    found = look(tmp_path)
    rules = params.select.model_copy(update={"min_pixels": 1, "max_flat_fraction": 1.0})
    settings = params.model_copy(update={"select": rules})
    counts = survivors(found, settings)
    assert (counts["candidates"], counts["kept"]) == (4, 1)
    assert (counts["rejected_entropy"], counts["rejected_integrity"]) == (2, 1)
    (line,) = advice(found, settings)
    assert line.startswith("select.min_entropy_bits: 7 rejects 2 of 3 measured; ")


def test_what_is_no_folder_of_photographs_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        look(tmp_path / "missing")
    (tmp_path / "a.heic").touch()
    with pytest.raises(ValueError, match=r"no photographs .*convert what is there: 1 \.heic"):
        look(tmp_path)
