"""Archives: every member is an image, a sidecar, set apart, or a loss with a cause."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from components.corpus.sources.download_journal import DownloadJournal, Loss, Stored
from components.corpus.sources.originals import original_path
from components.corpus.sources.records.archive_samples import ArchiveSamples, Member
from components.corpus.sources.records.ledger import Ledger, balanced
from components.corpus.sources.records.source_records import SourceRecord
from components.corpus.sources.webdataset import read_webdataset
from components.settings.corpus import DownloadSettings
from components.settings.schema import load_settings

ROOT = Path(__file__).parents[4]


def picture(kind: str = "JPEG", size: tuple[int, int] = (40, 30), colour: str = "teal") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def add(archive: tarfile.TarFile, name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> None:
    member = tarfile.TarInfo(name)
    member.type = kind
    member.size = len(data) if kind == tarfile.REGTYPE else 0
    member.linkname = "/etc/passwd" if kind != tarfile.REGTYPE else ""
    archive.addfile(member, io.BytesIO(data))


def small_limits(**changes: object) -> DownloadSettings:
    values = load_settings(ROOT / "params.yaml").ingest.download.model_dump()
    return DownloadSettings.model_validate(values | {"min_pixels": 100, "max_mb": 0.5} | changes)


def test_archives_give_images_with_sidecars_and_no_path_of_theirs_is_used(tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    with tarfile.open(tars / "a.tar", "w") as archive:
        add(archive, "0001.json", b'{"url": "http://a/1.jpg", "key": "k1", "sha": 5}')
        add(archive, "0001.jpg", picture())
        add(archive, "0001.txt", b" a caption\n")
        add(archive, "../../escape.jpg", picture(colour="red"))
        add(archive, "/tmp/absolute.jpg", picture(colour="blue"))
        add(archive, "link.jpg", b"", tarfile.SYMTYPE)
        add(archive, "only-text.txt", b"x")
        add(archive, "page.jpg", b"<html>")
        add(archive, "dot.jpg", picture("GIF"))
        add(archive, "tiny.png", picture("PNG", (9, 9)))
        add(archive, "huge.jpg", picture() + bytes(600_000))
        add(archive, "badjson.json", b"{")
        add(archive, "badjson.cls", b"3")
        add(archive, "badjson.webp", picture("WEBP"))
    data = (tars / "a.tar").read_bytes()
    (tars / "b.tar").write_bytes(data[:700])
    store = tmp_path / "store"
    with DownloadJournal(tmp_path / "j.sqlite", "s") as journal:
        items = read_webdataset(tars, "tars", store, journal, small_limits())
        records = list(balanced(items, Ledger()))
        outcomes = {record.place: journal.get(record.place) for record in records}
    results = {place: outcome.result for place, outcome in outcomes.items() if outcome}
    kept = [place for place, result in results.items() if isinstance(result, Stored)]
    assert kept == [
        "a.tar#0001.jpg",
        "a.tar#../../escape.jpg",
        "a.tar#/tmp/absolute.jpg",
        "a.tar#badjson.webp",
    ]
    lost = {place: result.cause for place, result in results.items() if isinstance(result, Loss)}
    assert lost == {
        "a.tar#link.jpg": "link",
        "a.tar#page.jpg": "wrong_content",
        "a.tar#dot.jpg": "wrong_content",
        "a.tar#tiny.png": "too_small",
        "a.tar#huge.jpg": "too_large",
    }
    first = records[0].values
    assert first == {"url": "http://a/1.jpg", "key": "k1", "sha": 5, "txt": "a caption"}
    by_place = {record.place: record for record in records}
    assert by_place["a.tar#only-text"].problem == "no image under this key, but 1 .txt"
    assert by_place["a.tar#badjson.webp"].values == {
        "json_problem": by_place["a.tar#badjson.webp"].values["json_problem"],  # type: ignore[index]
        "other_members": ["badjson.cls"],
    }
    assert by_place["b.tar"].problem.startswith("broken archive")
    # The store holds content addresses and nothing else; nothing was written beside it.
    names = sorted(path.name for path in store.rglob("*") if path.is_file())
    assert len(names) == 4
    assert all(len(name.partition(".")[0]) == 64 for name in names)
    assert {path.name for path in tmp_path.iterdir()} >= {"store", "tars"}
    assert not (tmp_path / "escape.jpg").exists()
    stored = results["a.tar#0001.jpg"]
    assert isinstance(stored, Stored)
    assert original_path(store, stored.sha256, ".jpg").read_bytes() == picture()


def test_what_macos_left_in_an_archive_is_counted_and_not_looked_at(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "m.tar", "w") as archive:
        for name in ("a.jpg", "./b.jpg", "../c.jpg"):
            add(archive, name, picture())
        add(archive, "a.txt", b"a caption")
        for name in ("._a.jpg", "._a.txt", "__MACOSX/x/._b.jpg", "x/.DS_Store", "@eaDir/a.jpg"):
            add(archive, name, b"litter")
        add(archive, "__MACOSX/._link.jpg", b"", tarfile.SYMTYPE)
    ledger = Ledger()
    with DownloadJournal(tmp_path / "j.sqlite", "s") as journal:
        items = read_webdataset(
            tmp_path / "m.tar", "m.tar", tmp_path / "store", journal, small_limits()
        )
        records = list(balanced(items, ledger))
    found = {record.place: record.values for record in records}
    assert found == {"m.tar#a.jpg": {"txt": "a caption"}, "m.tar#b.jpg": {}, "m.tar#../c.jpg": {}}
    assert ledger.files[0].apart == {"sidecars": 1, "of the system": 6}


def archive_of(path: Path, write: Callable[[tarfile.TarFile], None], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        write(archive)
    return path


class Read:
    """What one archive gives: records, outcomes by place, the account of its members."""

    def __init__(self, path: Path, folder: Path, **changes: object) -> None:
        ledger = Ledger()
        store = folder / "store"
        with DownloadJournal(folder / "j.sqlite", "s") as journal:
            items = read_webdataset(path, path.name, store, journal, small_limits(**changes))
            self.records: list[SourceRecord] = list(balanced(items, ledger))
            outcomes = {record.place: journal.get(record.place) for record in self.records}
        self.results = {place: o.result for place, o in outcomes.items() if o is not None}
        self.account = ledger.files[0]

    @property
    def kept(self) -> dict[str, dict[str, Any] | None]:
        """Values of the images that are in the store, by member."""
        return {
            record.place.partition("#")[2]: record.values
            for record in self.records
            if isinstance(self.results.get(record.place), Stored)
        }

    @property
    def lost(self) -> dict[str, str]:
        """Cause and detail by member; of broken records the problem."""
        causes = {
            place: f"{result.cause}: {result.detail}"
            for place, result in self.results.items()
            if isinstance(result, Loss)
        }
        broken = {r.place: r.problem for r in self.records if r.values is None}
        return {place.partition("#")[2]: text for place, text in {**causes, **broken}.items()}


def link(archive: tarfile.TarFile, name: str, target: str, kind: bytes = tarfile.LNKTYPE) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    archive.addfile(member)


def test_keys_with_several_dots_links_and_byte_order_marks(tmp_path: Path) -> None:
    def write(archive: tarfile.TarFile) -> None:
        add(archive, "img.2024.01.jpg", picture(colour="red"))
        add(archive, "img.2024.01.json", b'{"caption": "of img.2024.01"}')
        add(archive, "img.2024.02.jpg", picture(colour="blue"))
        add(archive, "img.2024.02.txt", b"\xef\xbb\xbfof img.2024.02")
        add(archive, "img.2024.03.json", b'{"caption": "of nothing"}')
        add(archive, "./000.jpg", picture())
        add(archive, "000.seg.png", picture("PNG"))
        add(archive, "000.json", b'\xef\xbb\xbf{"caption": "after a mark"}')
        add(archive, "000.cls", b"3")
        add(archive, "001.jpg.json", '{"caption": "of the whole name"}'.encode("utf-16"))
        add(archive, "001.jpg", picture(colour="lime"))
        link(archive, "hard.jpg", "000.jpg")
        link(archive, "hard.json", "./000.json")
        link(archive, "early.jpg", "later.jpg")
        link(archive, "sym.jpg", "000.jpg", tarfile.SYMTYPE)
        link(archive, "sym.txt", "000.jpg", tarfile.SYMTYPE)
        link(archive, "pipe", "", tarfile.FIFOTYPE)
        link(archive, "folder", "", tarfile.DIRTYPE)

    read = Read(archive_of(tmp_path / "a.tar", write), tmp_path)
    assert read.kept == {
        "img.2024.01.jpg": {"caption": "of img.2024.01"},
        "img.2024.02.jpg": {"txt": "of img.2024.02"},
        "000.jpg": {"caption": "after a mark", "other_members": ["000.cls"]},
        "000.seg.png": {"caption": "after a mark", "other_members": ["000.cls"]},
        "001.jpg": {"caption": "of the whole name"},
        "hard.jpg": {"caption": "after a mark"},
    }
    # The bytes of a hard link are those of its member: the tables make it a duplicate.
    assert read.results["a.tar#hard.jpg"] == read.results["a.tar#000.jpg"]
    assert read.lost == {
        "img.2024.03.json": "no image under this key, but 1 .json",
        "early.jpg": "link: hard link to later.jpg, which is not there before it",
        "sym.jpg": "link: symbolic link to 000.jpg; links are not followed",
    }
    assert (read.account.total, read.account.in_records) == (18, 8)
    assert read.account.apart == {
        "sidecars": 6,
        "others": 1,
        "links": 1,
        "devices": 1,
        "folders": 1,
    }
    assert read.account.notes == {"unread .cls": 1}


def test_members_of_a_sample_are_joined_however_far_apart_they_stand(tmp_path: Path) -> None:
    members = [(f"{n}.jpg", picture(colour=f"rgb({n}, 0, 0)")) for n in range(30)]
    members += [(f"{n}.json", json.dumps({"caption": f"of {n}"}).encode()) for n in range(30)]
    random.Random(1).shuffle(members)

    def write(archive: tarfile.TarFile) -> None:
        for name, data in members:
            add(archive, name, data)

    read = Read(archive_of(tmp_path / "a.tar", write), tmp_path)
    assert read.kept == {f"{n}.jpg": {"caption": f"of {n}"} for n in range(30)}
    assert read.lost == {}


def test_where_keys_begin_again_each_image_keeps_its_own_sidecar(tmp_path: Path) -> None:
    red, blue = picture(colour="red"), picture(colour="blue")

    def joined(archive: tarfile.TarFile) -> None:
        for image, caption in ((red, "red"), (blue, "blue")):
            add(archive, "0.jpg", image)
            add(archive, "0.json", json.dumps({"caption": caption}).encode())
            add(archive, "1.jpg", image)

    read = Read(archive_of(tmp_path / "a.tar", joined), tmp_path)
    assert sorted(values.get("caption", "-") for values in read.kept.values()) == [
        *("-", "-", "blue", "red")
    ]

    def shared(archive: tarfile.TarFile) -> None:
        add(archive, "0.jpg", red)
        add(archive, "0.txt", b"of both")
        add(archive, "0.jpg", blue)

    read = Read(archive_of(tmp_path / "b.tar", shared), tmp_path)
    assert list(read.kept.values()) == [{"txt": "of both"}] * 2


def test_pictures_are_known_by_their_bytes_and_unknown_kinds_are_counted_by_name(
    tmp_path: Path,
) -> None:
    def write(archive: tarfile.TarFile) -> None:
        add(archive, "1.jfif", picture())
        add(archive, "2.jpg_large", picture(colour="red"))
        add(archive, "3", picture(colour="blue"))
        add(archive, "4.gif", picture("GIF"))
        add(archive, "5.BMP", picture("BMP"))
        add(archive, "6.npy", b"\x93NUMPY")

    read = Read(archive_of(tmp_path / "a.tar", write), tmp_path)
    # A member without an ending is a place that ends with the dot.
    assert set(read.kept) == {"1.jfif", "2.jpg_large", "3."}
    assert {name: text.partition(";")[0][:41] for name, text in read.lost.items()} == {
        "4.gif": "wrong_content: unknown image type .gif: s",
        "5.bmp": "wrong_content: unknown image type .bmp: s",
        "6": "no image under this key, but 1 .npy",
    }
    assert read.account.notes == {
        "unknown image type .gif": 1,
        "unknown image type .bmp": 1,
        "unread .npy": 1,
    }


def _numbered(archive: tarfile.TarFile) -> None:
    for number in range(6):
        add(archive, f"{number}.jpg", picture(colour=f"rgb({number}, 0, 0)"))
        add(archive, f"{number}.txt", b"caption of %d" % number)


def test_of_a_damaged_archive_what_is_whole_stays_and_the_rest_is_counted(tmp_path: Path) -> None:
    whole = archive_of(tmp_path / "whole.tar", _numbered).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        headers = {member.name: member.offset for member in archive}
    read = Read(tmp_path / "whole.tar", tmp_path / "0")
    assert (len(read.kept), read.lost) == (6, {})

    # A flipped byte in one header costs this member, where Python's reader ends without a word.
    data = bytearray(whole)
    data[headers["2.jpg"] + 3] ^= 1
    (tmp_path / "flipped.tar").write_bytes(data)
    read = Read(tmp_path / "flipped.tar", tmp_path / "1")
    assert set(read.kept) == {"0.jpg", "1.jpg", "3.jpg", "4.jpg", "5.jpg"}
    assert read.lost["2"] == "no image under this key, but 1 .txt"
    assert "damaged blocks" in read.lost[""]

    # Cut within an image, within a caption, between members, within a header.
    for at, image in (
        (headers["3.jpg"] + 600, "3.jpg"),
        (headers["3.txt"] + 515, None),
        (headers["4.jpg"], None),
        (headers["4.jpg"] + 100, None),
    ):
        path = tmp_path / f"{at}.tar"
        path.write_bytes(whole[:at])
        read = Read(path, tmp_path / str(at))
        expected = 3 if image else 4
        assert set(read.kept) == {f"{n}.jpg" for n in range(expected)}
        lost = read.lost
        assert lost.pop("").startswith("broken archive: ")
        assert set(lost) == ({image} if image else set())

    # Two archives put together; packed; cut while packed.
    (tmp_path / "both.tar").write_bytes(whole + archive_of(tmp_path / "b", _last).read_bytes())
    assert len(Read(tmp_path / "both.tar", tmp_path / "2").kept) == 7
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(whole))
    assert len(Read(tmp_path / "a.tar.gz", tmp_path / "3").kept) == 6
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(whole, 0)[: len(whole) // 2])
    read = Read(tmp_path / "b.tar.gz", tmp_path / "4")
    assert 0 < len(read.kept) < 6
    assert read.lost[""].startswith("broken archive: ")
    (tmp_path / "c.tar").write_bytes(b"no archive" * 1000)
    assert Read(tmp_path / "c.tar", tmp_path / "5").lost == {
        "": "broken archive: not a tar archive"
    }


def _last(archive: tarfile.TarFile) -> None:
    add(archive, "last.jpg", picture(colour="white"))


def test_a_store_that_cannot_be_written_is_no_fault_of_the_archive(tmp_path: Path) -> None:
    path = archive_of(tmp_path / "a.tar", _numbered)
    (tmp_path / "store").write_text("a file where the store should be")
    with pytest.raises(OSError, match="store"):
        Read(path, tmp_path)


_PARTS = st.lists(st.sampled_from(["a", "b", "jpg", "json"]), min_size=1, max_size=3).map(".".join)


@given(st.lists(st.tuples(_PARTS, st.sampled_from([".jpg", ".json", ".cls", ""])), max_size=12))
def test_every_member_is_the_image_describes_one_or_is_named(names: list[tuple[str, str]]) -> None:
    """Against the rule, member by member, without any index."""
    kinds = {".jpg": "image", ".json": "sidecar", ".cls": "other", "": "other"}
    members = [
        Member(
            f"{stem}{ending}",
            kinds[ending],
            f"place {number}" if ending == ".jpg" else "",
            json.dumps({f"from {number}": 1}).encode() if ending == ".json" else b"",
        )
        for number, (stem, ending) in enumerate(names)
    ]
    with ArchiveSamples("tar") as samples:
        for member in members:
            samples.add(member)
        records = list(samples.records())
    images = {r.place: r.values for r in records if r.values is not None}
    alone = sum(
        int(part.split()[0])
        for record in records
        if record.values is None
        for part in record.problem.partition("but ")[2].split(", ")
    )
    assert len(images) == sum(member.kind == "image" for member in members)
    unplaced = 0
    for number, member in enumerate(members):
        if member.kind == "image":
            continue
        stem = list(member.stem)
        describes = near = False
        for image in (m for m in members if m.kind == "image"):
            values = images[image.place]
            assert values is not None
            named = list(image.parts)[: len(stem)] == stem and member.kind == "sidecar"
            assert (f"from {number}" in values) == named
            describes = describes or named
            shorter = min(len(stem), len(image.stem))
            near = near or list(image.stem)[:shorter] == stem[:shorter]
        unplaced += not describes and not near
    assert alone == unplaced


@pytest.mark.parametrize(
    ("ending", "mode"),
    [("tgz", "gz"), ("TBZ2", "bz2"), ("tar.bz2", "bz2"), ("txz", "xz"), ("tar.xz", "xz")],
)
def test_a_compressed_archive_is_read_under_each_of_its_endings(
    tmp_path: Path, ending: str, mode: Any
) -> None:
    with tarfile.open(tmp_path / f"a.{ending}", f"w:{mode}") as archive:
        add(archive, "1.jpg", picture())
    with DownloadJournal(tmp_path / "j.sqlite", "s") as journal:
        items = read_webdataset(tmp_path, "tars", tmp_path / "store", journal, small_limits())
        assert [record.place for record in balanced(items, Ledger())] == [f"a.{ending}#1.jpg"]
