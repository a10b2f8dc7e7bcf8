"""Members of one archive by sample, however far apart they stand; held on disk, not in memory.

A sample is WebDataset's: members whose names agree up to the first dot of the last path segment.
Within it the rest of the name decides: `img.2024.01.json` describes `img.2024.01.jpg` and not
`img.2024.02.jpg`; `000.json` describes `000.jpg` and `000.seg.png`; `a.jpg.json` describes `a.jpg`.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

from components.corpus.sources.records.json_values import parse_json
from components.corpus.sources.records.source_records import SourceRecord
from components.corpus.sources.records.text_lines import marked_encoding
from components.files.parquet_files import storable

SIDECARS = frozenset({"json", "txt"})
_TABLE = """\
create table members (
  number integer primary key, key text, name text, kind text, place text, body blob, problem text
);
create index by_name on members (name);
create index by_place on members (place) where place != '';
"""
_IN_ORDER = """\
select key, name, kind, place, body, problem from members
join (select key as sample, min(number) as first from members group by key) on key = sample
order by first, number
"""


Stem = tuple[str, ...]


def key_and_ending(name: str) -> tuple[str, str]:
    """WebDataset's split: the key ends at the first dot of the last path segment."""
    path = PurePosixPath(name)
    stem, _, ending = path.name.partition(".")
    return storable(str(path.with_name(stem) if stem else path)), ending.lower()


@dataclass(frozen=True)
class Member:
    """A member that has been read."""

    name: str
    kind: str
    """"image", "sidecar" or "other"."""
    place: str = ""
    """Of an image: what its outcome is known by."""
    body: bytes = b""
    """Of a sidecar."""
    problem: str = ""
    """Why a sidecar has none."""

    @property
    def parts(self) -> Stem:
        """The last path segment, cut at its dots."""
        return tuple(PurePosixPath(self.name).name.split("."))

    @property
    def stem(self) -> Stem:
        """`parts` without the file ending."""
        return self.parts[:-1] or self.parts


class ArchiveSamples:
    """Members in, records out.

    Args:
        archive: its name in places.
    """

    def __init__(self, archive: str) -> None:
        self._archive = archive
        # A database without a name is a temporary file that grows beyond a small cache.
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.executescript(_TABLE)
        # Nothing here outlives the archive that is read: no journal, one transaction.
        self._database.execute("pragma journal_mode = off")
        self._database.execute("begin")

    def __enter__(self) -> ArchiveSamples:
        return self

    def __exit__(self, *problem: object) -> None:
        self._database.close()

    def add(self, member: Member) -> None:
        """Hold a member; its name may occur again."""
        self._database.execute(
            "insert into members (key, name, kind, place, body, problem) values (?, ?, ?, ?, ?, ?)",
            (
                key_and_ending(member.name)[0],
                # "./a.jpg" and "a.jpg" are one name to whoever links to it.
                str(PurePosixPath(storable(member.name))),
                member.kind,
                member.place,
                member.body,
                member.problem,
            ),
        )

    def find(self, name: str) -> Member | None:
        """The last member of that name so far."""
        row = self._database.execute(
            "select name, kind, place, body, problem from members where name = ? "
            "order by number desc limit 1",
            (str(PurePosixPath(storable(name))),),
        ).fetchone()
        return None if row is None else Member(*row)

    def has_place(self, place: str) -> bool:
        """Whether an image is known by this place."""
        found = self._database.execute(
            "select 1 from members where place = ? and place != '' limit 1", (place,)
        )
        return found.fetchone() is not None

    def records(self) -> Iterator[SourceRecord]:
        """One record per image, samples in the order of their first members.

        Of each image, the sidecars that describe it are its values; other members of the sample
        are named. What describes no image is a broken record without units: `Member`s are counted
        by kind.
        """
        rows = self._database.execute(_IN_ORDER)
        for key, group in groupby(rows, key=lambda row: str(row[0])):
            yield from self._sample(key, [Member(*row[1:]) for row in group])

    def _sample(self, key: str, members: list[Member]) -> Iterator[SourceRecord]:
        named: set[int] = set()
        for turn in _turns(members):
            yield from self._turn(key, turn, named)
            # By identity, as below: what stands in several turns is named in the first.
            named |= {id(member) for member in turn}

    def _turn(
        self, key: str, members: list[Member], named: Collection[int]
    ) -> Iterator[SourceRecord]:
        images = [member for member in members if member.kind == "image"]
        others = [member for member in members if member.kind != "image"]
        by_stem: dict[Stem, list[Member]] = {}
        for member in others:
            by_stem.setdefault(member.stem, []).append(member)
        sidecars = [
            [member for member in _named_by(image.parts, by_stem) if member.kind == "sidecar"]
            for image in images
        ]
        # By identity: two members may be equal in all fields and are still two.
        used = {id(member) for mine in sidecars for member in mine}
        rest = [member for member in others if id(member) not in used]
        near = _near(images, rest)
        for image, mine in zip(images, sidecars, strict=True):
            values = _values(mine)
            if beside := near.get(image.stem):
                values["other_members"] = [member.name for member in beside]
            yield SourceRecord(image.place, values)
        known = {id(member) for beside in near.values() for member in beside}
        alone = [m for m in rest if id(m) not in known and id(m) not in named]
        # One loss for the sample, not one per member: a folder of labels would bury the other
        # losses.
        if alone:
            endings = Counter(f".{member.parts[-1].lower()}" for member in alone)
            listed = ", ".join(f"{number} {ending}" for ending, number in sorted(endings.items()))
            place = f"{self._archive}#{alone[0].name if images else key}"
            problem = f"no image under this key, but {listed}"
            yield SourceRecord(place, None, problem, units=0)


def _turns(members: list[Member]) -> list[list[Member]]:
    """Samples of one key: several where images stand in the archive more than once.

    Keys begin again where archives were joined, so the second image of a name goes with the second
    sidecar of a name. What does not stand there as often describes all of that name.
    """
    seen: Counter[str] = Counter()
    turn_of = []
    for member in members:
        turn_of.append(seen[member.name])
        seen[member.name] += 1
    repeats = max((seen[member.name] for member in members if member.kind == "image"), default=1)
    if repeats == 1:
        return [members]
    turns: list[list[Member]] = [[] for _ in range(repeats)]
    for member, turn in zip(members, turn_of, strict=True):
        if member.kind == "image" or seen[member.name] == repeats:
            turns[turn].append(member)
        else:
            for one in turns:
                one.append(member)
    return turns


def _named_by(parts: Stem, by_stem: dict[Stem, list[Member]]) -> list[Member]:
    """Members whose name without ending begins (or is) the name `parts`, the shortest first."""
    return [
        member for length in range(1, len(parts) + 1) for member in by_stem.get(parts[:length], ())
    ]


def _near(images: list[Member], others: list[Member]) -> dict[Stem, list[Member]]:
    """By the stem of an image: members where one name without ending begins the other."""
    near: dict[Stem, list[Member]] = {image.stem: [] for image in images}
    by_stem: dict[Stem, list[Member]] = {}
    for member in others:
        by_stem.setdefault(member.stem, []).append(member)
        for length in range(1, len(member.stem)):
            if member.stem[:length] in near:
                near[member.stem[:length]].append(member)
    for stem, found in near.items():
        found[:0] = _named_by(stem, by_stem)
    return near


def _text(body: bytes) -> str:
    return body.decode(marked_encoding(body) or "utf-8", "replace")


def _values(sidecars: list[Member]) -> dict[str, Any]:
    """What sidecars say; the later ones, whose names are closer to the image's, count more."""
    values: dict[str, Any] = {}
    text: str | None = None
    for member in sidecars:
        ending = member.parts[-1].lower()
        if member.problem:
            values[f"{ending}_problem"] = member.problem
        elif ending == "txt":
            # Kept apart until the end: a caption in JSON is said on purpose, the text file's is the
            # fallback.
            text = _text(member.body).strip()
        else:
            _read_json(_text(member.body), values)
    if text is not None:
        values.setdefault("txt", text)
    return values


def _read_json(text: str, values: dict[str, Any]) -> None:
    try:
        found = parse_json(text)
    except ValueError as problem:
        values["json_problem"] = str(problem)
        return
    if isinstance(found, dict):
        values.update(found)
    else:
        values["json"] = found
