from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from components.corpus.folder_survey import (
    Proposal,
    advice,
    expected,
    local_captioner,
    propose,
    survey,
    survivors,
)
from components.corpus.tiny_captioner import write_tiny_captioner
from components.settings.schema import Settings, load_settings, parse_settings

ROOT = Path(__file__).parents[3]
CAPTION = (
    "A wooden boat lies at the shore of a quiet lake, with soft light from the left, tall dark "
    "pines behind it, and a wide sky above that turns orange towards the far end of the valley."
)


@pytest.fixture(scope="module")
def params() -> Settings:
    return load_settings(ROOT / "params.yaml")


def write(path: Path, *, edge: int = 300, flat: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(0, 256, (edge, edge, 3), np.uint8)
    Image.fromarray(noise if not flat else noise // 200).save(path)


def changed(params: Settings, proposal: Proposal) -> dict[str, Any]:
    """Values of settings with a proposal over them, at any depth."""
    values: Any = OmegaConf.merge(params.model_dump(mode="json"), proposal.settings)
    return dict(OmegaConf.to_container(values))


def taking(params: Settings) -> Settings:
    """Settings that take small photographs with short captions."""
    rules = params.select.model_copy(update={"min_pixels": 1})
    caption = params.caption.model_copy(update={"min_words": 1})
    return params.model_copy(update={"select": rules, "caption": caption})


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
    assert (found.photographs, found.nested, found.captions.files) == (6, True, 1)
    few = params.ingest.model_copy(update={"extensions": (".jpg",), "recursive": False})
    proposal = propose(found, params.model_copy(update={"ingest": few}), "photos")
    ingest = proposal.settings["ingest"]
    assert set(ingest["extensions"]) == {".jpg", ".jpeg", ".bmp", ".gif", ".png"}
    assert ingest["recursive"] is True
    assert ingest["attribution"] is None
    said = "\n".join(proposal.remarks)
    assert "not read: 1 .heic" in said
    assert "1 of 6 files that were looked at cannot be read, such as g.jpg: not an image" in said
    assert "captions: 1 text files beside photographs, for 6 photographs" in said
    assert "5 photographs without a caption are rejected" in said
    assert proposal.settings["caption"] == {"min_words": 1}


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
    said = "\n".join(proposal.remarks)
    assert "captions: 1 lines of captions.jsonl, for 2 photographs" in said
    # One with a byte order mark, and a text file where there is no line; both are read.
    (tmp_path / "captions.jsonl").write_text("\ufeff" + lines[0])
    (tmp_path / "b.txt").write_text("word " * 200)
    proposal = propose(look(tmp_path), params, "photos")
    assert proposal.settings["caption"] == {"min_words": 12, "max_words": 200}
    said = "\n".join(proposal.remarks)
    assert "1 lines of captions.jsonl and 1 text files beside photographs, for 2" in said
    assert "without a caption" not in said


def test_text_files_that_are_no_captions_are_not_counted_as_captions(
    tmp_path: Path, params: Settings
) -> None:
    for name in "abcdef":
        write(tmp_path / f"{name}.png")
    unread = {"a": b" \n", "b": "André".encode("latin-1"), "c": b"", "d": b"a " * 2**20}
    for name, data in unread.items():
        (tmp_path / f"{name}.txt").write_bytes(data)
    proposal = propose(look(tmp_path), params, "photos")
    causes = "a.txt: empty (and 1 more); b.txt: not UTF-8; d.txt: 2097152 bytes are no caption"
    said = f"captions that cannot be read: 4, such as {causes}"
    assert said in proposal.remarks
    assert proposal.settings["caption"]["provider"] == "fixed"
    assert any("no caption can be read. For captions" in remark for remark in proposal.remarks)
    (tmp_path / "e.txt").write_text("word " * 30)
    (tmp_path / "captions.jsonl").write_text('{"file": "f.png", "caption_en": " "}\n')
    found = look(tmp_path)
    captions = found.captions
    assert (captions.lines, captions.files, captions.words) == (0, 1, [30])
    remarks = propose(found, params, "photos").remarks
    assert "captions: 1 text files beside photographs, for 6 photographs" in remarks
    assert any("5 photographs without a caption are rejected" in remark for remark in remarks)


def test_a_captions_file_of_no_use_is_said_and_a_text_for_all_proposed(
    tmp_path: Path, params: Settings
) -> None:
    folder = tmp_path / "My_dog Rex"
    write(folder / "a.png")
    (folder / "captions.jsonl").write_text('{"image": "a.png"}\n')
    proposal = propose(look(folder), params, "photos")
    caption = proposal.settings["caption"]
    assert (caption["provider"], caption["text"]) == ("fixed", "a photo of my dog rex")
    assert caption["translate"]["provider"] == "none"
    said = "\n".join(proposal.remarks)
    assert "not read: captions.jsonl: none of its 1 lines can be used" in said
    assert caption["provided"] == "ignore"
    # The proposal is valid settings.
    parse_settings(changed(params, proposal))


def test_a_captioning_model_that_is_there_is_proposed_and_other_networks_are_not(
    tmp_path: Path, params: Settings
) -> None:
    write(tmp_path / "photos" / "a.png")
    scorer = tmp_path / "weights" / "a-scorer"
    scorer.mkdir(parents=True)
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        (scorer / name).write_text("{}")
    (scorer / "model.safetensors").write_bytes(bytes(9))
    assert local_captioner(tmp_path) is None
    write_tiny_captioner(tmp_path / "weights" / "tiny", seed=0)
    assert local_captioner(tmp_path) == "weights/tiny"
    found = survey(
        tmp_path / "photos",
        attribution="ATTRIBUTION.csv",
        captions="captions.jsonl",
        captioner=local_captioner(tmp_path),
    )
    proposal = propose(found, params, "photos")
    caption = proposal.settings["caption"]
    assert (caption["provider"], caption["local"]["folder"]) == ("local", "weights/tiny")
    parse_settings(changed(params, proposal))


def test_what_cannot_be_opened_is_named_by_its_cause(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    (tmp_path / "gone\n.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert sorted(look(tmp_path).unreadable) == [
        "gone\\n.jpg: cannot read: No such file or directory",
        "pipe.jpg: not a regular file",
    ]


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
    few, line = advice(found, settings)
    assert line.startswith("select.min_entropy_bits: 7 rejects 2 of 3 measured; ")
    held_out = settings.slices.eval_min_images
    assert few.startswith(f"too few are left: slices.eval_min_images holds out {held_out}, ")


def test_one_photograph_more_than_is_held_out_is_enough(tmp_path: Path, params: Settings) -> None:
    slices = params.slices.model_copy(update={"eval_min_images": 2})
    settings = taking(params).model_copy(update={"slices": slices})
    (tmp_path / "captions.jsonl").write_text(
        "".join(
            json.dumps({"file": name, "caption_en": CAPTION}) + "\n"
            for name in ("a.png", "bb.png", "ccc.png")
        )
    )
    for name in ("a.png", "bb.png"):
        write(tmp_path / name)
    assert len(advice(look(tmp_path), settings)) == 1
    write(tmp_path / "ccc.png")
    assert advice(look(tmp_path), settings) == []


def test_only_photographs_with_a_caption_that_the_stage_takes_are_expected_to_be_left(
    tmp_path: Path, params: Settings
) -> None:
    settings = taking(params)
    for name in ("a.png", "bb.png", "ccc.png", "dddd.png"):
        write(tmp_path / name, flat=name == "dddd.png")
    for name, text in {"a": CAPTION, "bb": f"<b>{CAPTION}</b>", "dddd": CAPTION}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    found = look(tmp_path)
    # One has no caption, one has markup, one is flat.
    assert expected(found, settings) == 1
    remarks = "\n".join(propose(found, settings, "photos").remarks)
    assert "captions that are rejected: 1 of 3 that were looked at: markup (1): strip" in remarks
    assert "slices.min_images: 1: as many as there are" in remarks
    assert advice(found, settings)[0].endswith("add photographs, or captions to those without")
    # Where a model writes them, none is lacking; what came along stays unless it may be replaced.
    written = {"provider": "fixed", "text": "a photograph"}
    for provided, left in (("keep", 2), ("replace_failed", 3), ("ignore", 3)):
        caption = settings.caption.model_copy(update=written | {"provided": provided})
        assert expected(found, settings.model_copy(update={"caption": caption})) == left


def test_captions_of_a_large_folder_count_by_their_share(tmp_path: Path, params: Settings) -> None:
    settings = taking(params)
    for n in range(30):
        write(tmp_path / f"{n:02}.png", edge=64)
    found = look(tmp_path)
    assert expected(found, settings) == 0
    for n in range(0, 30, 3):
        (tmp_path / f"{n:02}.txt").write_text(CAPTION)
    counts = survivors(found, settings)
    share = counts["kept"] / counts["candidates"]
    assert expected(look(tmp_path), settings) == pytest.approx(10 * share)


def test_what_is_no_folder_of_photographs_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        look(tmp_path / "missing")
    (tmp_path / "a.heic").touch()
    with pytest.raises(ValueError, match=r"no photographs .*convert what is there: 1 \.heic"):
        look(tmp_path)
