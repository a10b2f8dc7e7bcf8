"""Captions in files: any spelling of a name is found, and what is wrong costs one line."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.corpus.captions.caption_files import CaptionLoss, KnownFiles, read_captions
from components.corpus.captions.checks import Judged
from components.corpus.captions.provided import provided_captions
from components.settings.captions import CaptionSettings
from components.settings.schema import load_settings

ROOT = Path(__file__).parents[4]
INGEST = load_settings(ROOT / "params.yaml").ingest
SETTINGS = load_settings(ROOT / "params.yaml").caption.model_copy(update={"min_words": 3})
LONG = "a calm lake below red hills"
NFD = unicodedata.normalize("NFD", "café.jpg")
NFC = unicodedata.normalize("NFC", "café.jpg")


def line(file: object, **changes: object) -> str:
    return json.dumps({"file": file, "caption_en": LONG, "caption_zh": None} | changes)


def write(folder: Path, *lines: str | bytes, start: bytes = b"", end: bytes = b"\n") -> Path:
    path = folder / "c.jsonl"
    data = [one if isinstance(one, bytes) else one.encode() for one in lines]
    path.write_bytes(start + end.join(data))
    return path


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("a.jpg", "a.jpg"),
        ("./a.jpg", "a.jpg"),
        (" a.jpg ", "a.jpg"),
        ("sub\\b.jpg", "sub/b.jpg"),
        (".\\sub\\b.jpg", "sub/b.jpg"),
        ("sub//b.jpg", "sub/b.jpg"),
        ("\ufeffa.jpg", "a.jpg"),
        (NFC, NFD),
        (NFD, NFD),
    ],
)
def test_names_match_in_any_spelling(tmp_path: Path, name: str, file: str) -> None:
    captions, losses = read_captions(write(tmp_path, line(name)), {"a.jpg", "sub/b.jpg", NFD})
    assert (list(captions), losses) == ([file], [])


def test_an_exact_name_wins_and_an_ambiguous_one_is_a_loss() -> None:
    known = KnownFiles([NFC, NFD])
    assert (known.find(NFC), known.find(NFD)) == (NFC, NFD)
    with pytest.raises(ValueError, match="fits several photographs"):
        known.find(f"./{NFC}")
    assert KnownFiles(["a\\b.jpg", "a/b.jpg"]).find("a\\b.jpg") == "a\\b.jpg"


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_and_line_ends_of_windows_are_read(
    tmp_path: Path, start: bytes, end: bytes
) -> None:
    path = write(tmp_path, line("a"), line("b"), start=start, end=end)
    captions, losses = read_captions(path, {"a", "b"})
    assert (set(captions), losses) == ({"a", "b"}, [])


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_with_its_mark_is_read(tmp_path: Path, encoding: str) -> None:
    text = "\ufeff" + line("a", caption_en="a café by the lake") + "\r\n" + line("b")
    (tmp_path / "c.jsonl").write_bytes(text.encode(encoding))
    captions, losses = read_captions(tmp_path / "c.jsonl", {"a", "b"})
    assert (set(captions), losses) == ({"a", "b"}, [])
    assert captions["a"].english == "a café by the lake"


def test_captions_with_line_separators_inside_are_one_line_each(tmp_path: Path) -> None:
    record = {"file": "a", "caption_en": "one\u2028two three"}
    path = write(tmp_path, json.dumps(record, ensure_ascii=False), "", line("b"))
    assert set(read_captions(path, {"a", "b"})[0]) == {"a", "b"}


@pytest.mark.parametrize(
    ("bad", "detail"),
    [
        ("{not json", "not JSON: Expecting property name"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "expected an object"),
        (line("b"), "'b' has a caption already, on line 1"),
        (line("./b"), "'./b' has a caption already, on line 1"),
        (line("deleted.jpg"), "'deleted.jpg' is not a photograph of ingest.source"),
        (line("a", caption_en=5), "'caption_en' must be text, got 5"),
        (json.dumps({"caption_en": LONG}), "'file' must be text, got None"),
        ('{"file":"a\\ud83d","caption_en":"a dog"}', "characters that no file name can have"),
        ('{"file":"a","caption_en":["\\ud83d"]}', "'caption_en' must be text"),
        (b'{"file":"a","caption_en":"caf\xe9"}', "not UTF-8"),
    ],
)
def test_one_bad_line_is_one_loss_with_its_number(
    tmp_path: Path, bad: str | bytes, detail: str
) -> None:
    path = write(tmp_path, line("b"), "", bad, line("c"))
    captions, losses = read_captions(path, {"a", "b", "c"})
    assert set(captions) == {"b", "c"}
    assert [loss.record for loss in losses] == ["c.jsonl line 3"]
    assert detail in losses[0].detail
    losses[0].detail.encode()


def test_half_of_a_surrogate_pair_is_mended_counted_and_not_used(tmp_path: Path) -> None:
    path = write(tmp_path, '{"file":"a","caption_en":"a small \\ud83d dog by the lake"}')
    captions, losses = read_captions(path, {"a"})
    assert captions["a"].english == "a small \ufffd dog by the lake"
    assert [loss.record for loss in losses] == ["c.jsonl line 1"]


def test_a_file_of_which_no_line_can_be_used_is_another_kind_of_file(tmp_path: Path) -> None:
    path = write(tmp_path, "file,caption", "a.jpg,a lake")
    with pytest.raises(ValueError, match=r"c\.jsonl: none of its 2 lines can be used.*line 1: not"):
        read_captions(path, {"a.jpg"})
    with pytest.raises(ValueError, match=r"d\.jsonl: not found.*beside a\.jpg.*caption\.file"):
        read_captions(tmp_path / "d.jsonl", set())
    assert read_captions(write(tmp_path, ""), {"a.jpg"}) == ({}, [])


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_any_bytes_give_captions_and_losses_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    lines = [one.replace(b"\n", b" ") for one in lines]
    path = write(folder, line("a"), *lines)
    captions, losses = read_captions(path, {"a"})
    assert set(captions) == {"a"}
    # Blank as bytes.strip says: every other line is accounted for.
    assert len(losses) == sum(bool(one.strip()) for one in lines)


def provided(
    root: Path,
    *files: str,
    settings: CaptionSettings = SETTINGS,
    copies: Mapping[str, list[str]] | None = None,
) -> tuple[list[Judged], list[CaptionLoss]]:
    ingest = INGEST.model_copy(update={"source": "photos"})
    uris = [f"photos/{file}" for file in files]
    table = pd.DataFrame({"image_id": files, "uri": uris, "kept": True})
    found = provided_captions(table["uri"], copies or {}, ingest, settings, root)
    # Each model that is asked reads what came once more.
    assert found.of(table[:1]) == found.of(table)[:1]
    return found.of(table), found.losses


def test_text_files_beside_photographs_fill_what_the_file_leaves(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    (photos / "captions.jsonl").write_text(line("a.jpg"))
    (photos / "a.txt").write_text("the file has a line for this one")
    (photos / "sub" / "b.2024.txt").write_text("\ufeffa calm lake\r\nbelow red hills\n")
    (photos / unicodedata.normalize("NFC", "é.txt")).write_text("a lake by night")
    (photos / "blank.TXT").write_text(" \n")
    os.mkfifo(photos / "pipe.txt")
    (photos / "latin.txt").write_bytes(b"a caf\xe9 by a lake")
    (photos / "out.txt").symlink_to(tmp_path / "elsewhere.txt")
    (tmp_path / "elsewhere.txt").write_text("not ours to read")
    files = ["a.jpg", "sub/b.2024.jpg", unicodedata.normalize("NFD", "é.png"), "blank.jpg"]
    files += ["pipe.jpg", "latin.jpg", "out.jpg", "none.jpg"]
    for file in files:
        (photos / file).touch()
    rows, losses = provided(tmp_path, *files)
    assert [row.english for row in rows[:3]] == [LONG, LONG, "a lake by night"]
    assert [row.status for row in rows] == ["ok"] * 3 + ["missing"] * 5
    assert [row.caption_model for row in rows[:2]] == [
        "provided: captions.jsonl",
        "provided: text file",
    ]
    assert len(losses) == 3
    assert {loss.record: loss.detail for loss in losses} == {
        "pipe.txt": "not a regular file",
        "latin.txt": "not UTF-8",
        "out.txt": "symbolic link that leaves the source folder; not followed",
    }


def test_a_copy_of_the_same_bytes_brings_the_caption_that_the_original_lacks(
    tmp_path: Path,
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "z.txt").write_text(LONG)
    (tmp_path / "photos" / "b.txt").write_text("own words")
    for name in "abz":
        (tmp_path / "photos" / f"{name}.jpg").touch()
    copies = {"a.jpg": ["photos/y.jpg", "photos/z.jpg"], "b.jpg": ["photos/z.jpg"]}
    rows, losses = provided(tmp_path, "a.jpg", "b.jpg", "c.jpg", copies=copies)
    assert [row.english for row in rows] == [LONG, "own words", None]
    assert losses == []


def test_a_text_file_is_of_the_photograph_of_its_very_name(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    nfc, nfd = NFC.removesuffix(".jpg"), NFD.removesuffix(".jpg")
    stems = ["trail", "trail ", "lead", " lead", nfc, nfd, "mixed", "win\\name"]
    for stem in [*stems, "bare ", f"{nfc}s"]:
        (photos / f"{stem}.jpg").touch()
    for stem in stems:
        ending = "Txt" if stem == "mixed" else "txt"
        (photos / f"{stem}.{ending}").write_text(f"words of photograph {stem!a}")
    rows, losses = provided(tmp_path, *(f"{stem}.jpg" for stem in stems))
    assert [row.english for row in rows] == [f"words of photograph {s!a}" for s in stems]
    assert losses == []
    # Exactly another photograph's: not this one's, however it is spelled.
    (photos / f"{nfc}.txt").unlink()
    (photos / "lead.txt").rename(photos / "leaf.txt")
    (photos / "mixed.tXt").write_text("two of them")
    (photos / f"{nfd}s.txt").write_text("of one photograph alone")
    rows, losses = provided(tmp_path, f"{nfc}.jpg", "bare .jpg", "mixed.jpg", f"{nfc}s.jpg")
    assert [row.english for row in rows] == [None, None, None, "of one photograph alone"]
    assert [str(loss) for loss in losses] == [
        "mixed.jpg: several text files fit, such as mixed.Txt and mixed.tXt",
        "leaf.txt: a text file beside no photograph of its name, and 2 more",
    ]


def test_text_files_alone_are_enough_and_beside_models_nothing_is_needed(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="no photograph has a text file beside it"):
        provided(tmp_path, "a.jpg")
    writing = SETTINGS.model_copy(update={"provider": "endpoint"})
    assert provided(tmp_path, "a.jpg", settings=writing)[0][0].status == "missing"
    (tmp_path / "photos" / "a.txt").write_text(LONG)
    assert provided(tmp_path, "a.jpg", "b.jpg")[0][0].status == "ok"
    # Beside models a captions file may be missing, and not of another kind.
    (tmp_path / "photos" / "captions.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        provided(tmp_path, "a.jpg", settings=writing)
