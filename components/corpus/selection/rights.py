"""Whose photographs a corpus may hold: rules about licences, and the list of exclusions.

Nothing here is legal advice. Names of licences are brought into one spelling so that rules can name
them; what a licence asks for is for people to read.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal as Choice
from typing import get_args
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pyarrow as pa

from components.corpus.manifest_columns import manifest_batches
from components.corpus.other_credits import OTHER_CREDITS, other_credits
from components.corpus.written_tables import written_columns, written_rows
from components.files.whole_files import write_text
from components.settings.corpus import LicenseSettings

EXCLUDED = "excluded"
"""Column of rows that the list of exclusions names, beside those of a manifest."""
UNKNOWN = "unknown"
Kind = Choice["identity", "url", "photographer", "host"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FIELDS = ("kind", "value", "why")

_REMARK = re.compile(r"\s*\([^()]*\)\s*$")
_PARTS = {
    "attribution": "by",
    "sharealike": "sa",
    "share-alike": "sa",
    "noncommercial": "nc",
    "non-commercial": "nc",
    "noderivatives": "nd",
    "noderivs": "nd",
    "no-derivatives": "nd",
}
_CC = re.compile(r"\b(by(?:-(?:nc|nd|sa))*)(?:[-/ ]v?(\d(?:\.\d)?))?\b")
_SHARE_ALIKE = re.compile(r"^(CC-BY(-NC)?-SA|A?GPL|LGPL|GFDL|ODBL|OSL|FAL|FREE ART)", re.IGNORECASE)


def license_id(text: object) -> str:
    """One spelling of a licence: SPDX's for Creative Commons, "public-domain", or the text itself.

    Args:
        text: a name ("CC BY-SA 4.0", "Attribution-ShareAlike 4.0 International"), an address of
            creativecommons.org, or what else a source says; None and blanks are "unknown".
    """
    if not isinstance(text, str) or not text.strip():
        return UNKNOWN
    given = " ".join(unicodedata.normalize("NFKC", text).split())
    plain = given.casefold()
    if "publicdomain/zero" in plain or re.match(r"cc[- ]?0\b", plain):
        return "CC0-1.0"
    if plain in {"public domain", "public-domain", "pdm", "pd"} or "publicdomain/mark" in plain:
        return "public-domain"
    is_cc = "creativecommons.org/licenses/" in plain or re.match(
        r"(cc[- ]|creative commons|attribution\b)", plain
    )
    if not is_cc:
        return given
    for long, short in _PARTS.items():
        plain = plain.replace(long, short)
    found = _CC.search(plain.replace("_", "-").replace(" sa", "-sa").replace(" nc", "-nc"))
    if found is None:
        return given
    version = found[2] or ""
    version = f"{version}.0" if len(version) == 1 else version
    return "-".join(part for part in ("CC", found[1].upper(), version) if part)


def license_url(name: str) -> str:
    """Address of a Creative Commons licence's text by `license_id`; empty for others."""
    if name == "CC0-1.0":
        return "https://creativecommons.org/publicdomain/zero/1.0/"
    found = re.fullmatch(r"CC-(BY(?:-(?:NC|ND|SA))*)-(\d\.\d)", name)
    return (
        ""
        if found is None
        else (f"https://creativecommons.org/licenses/{found[1].lower()}/{found[2]}/")
    )


def is_share_alike(name: str) -> bool:
    """Whether a licence by `license_id` asks for itself in what is made from the work."""
    return _SHARE_ALIKE.match(name) is not None


def is_refused(name: str, settings: LicenseSettings) -> bool:
    """Whether the settings deny a licence, or allow only others.

    Args:
        name: by `license_id`.
        settings: rules.
    """

    def named(patterns: Iterable[str]) -> bool:
        return any(fnmatch.fnmatchcase(name.upper(), pattern.upper()) for pattern in patterns)

    return named(settings.deny) or (settings.allow is not None and not named(settings.allow))


def refused_licenses(table: pd.DataFrame, settings: LicenseSettings) -> np.ndarray | None:
    """(rows,) bool: whose licence the settings refuse; None where they refuse none.

    Args:
        table: manifest; without a column `license` every licence is unknown.
        settings: rules.
    """
    if settings.allow is None and not settings.deny:
        return None
    return _by_license(table, lambda name: is_refused(name, settings))


def kept_apart(table: pd.DataFrame, settings: LicenseSettings) -> np.ndarray | None:
    """(rows,) bool: which rows the term share-alike keeps out; None where nothing is kept apart."""
    if settings.share_alike == "mixed":
        return None
    if settings.share_alike == "without":
        return _by_license(table, is_share_alike)
    return _by_license(table, lambda name: not is_share_alike(name))


def _by_license(table: pd.DataFrame, is_meant: Callable[[str], bool]) -> np.ndarray:
    missing = pd.Series([None] * len(table), dtype=object)
    given = table["license"].astype(object) if "license" in table else missing
    found = _told(given, lambda text: is_meant(license_id(text)), is_meant(UNKNOWN))
    for row, others in other_credits(table):
        # One copy that is meant is enough, and what one copy says is known of all of them.
        texts = (given.iloc[row], *(other.get("license") for other in others))
        names = set(map(license_id, texts)) - {UNKNOWN}
        found[row] = any(map(is_meant, names or {UNKNOWN}))
    return found


def _told(texts: pd.Series, is_meant: Callable[[str], bool], missing: bool = False) -> np.ndarray:
    """(rows,) bool, asked once per distinct text: a million rows share a handful."""
    codes, distinct = pd.factorize(texts.astype(object), use_na_sentinel=True)
    # Code -1, no text, is the last entry.
    meant = np.array([*(is_meant(str(text)) for text in distinct), missing], dtype=bool)
    return np.asarray(meant[codes])


@dataclass(frozen=True)
class Exclusion:
    """One entry of the list."""

    kind: Kind
    value: str
    why: str = ""


def read_exclusions(path: Path) -> list[Exclusion]:
    """The list of exclusions.

    Raises:
        ValueError: not there, no such columns, or a line that means nobody; one line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as problem:
        raise ValueError(
            f"{path}: cannot be read ({problem.strerror}); it is the list of "
            f"select.exclusions, a CSV with the columns {', '.join(FIELDS)}"
        ) from None
    return parse_exclusions(text, str(path))


def parse_exclusions(text: str, where: str) -> list[Exclusion]:
    """Entries of a CSV with the columns `FIELDS`.

    Args:
        text: of the file.
        where: its name in messages.

    Raises:
        ValueError: see `read_exclusions`.
    """
    columns = written_columns(text)
    missing = [name for name in ("kind", "value") if name not in columns]
    if missing:
        raise ValueError(f"{where}: no column {missing[0]}; the columns are {', '.join(FIELDS)}")
    return [
        exclusion(row.get("kind", ""), row.get("value", ""), row.get("why", ""), place)
        for place, row in written_rows(text, where, FIELDS)
    ]


def exclusion(kind: str, value: str, why: str, where: str) -> Exclusion:
    """A checked entry.

    Raises:
        ValueError: an unknown kind, or an empty value; one line that begins with `where`.
    """
    kind, value = kind.strip(), value.strip()
    if kind not in KINDS:
        raise ValueError(f"{where}: kind {kind!r}; choose {', '.join(KINDS)}")
    # A host or a name of nothing would mean every row that has none.
    if not _key(kind, value):
        raise ValueError(f"{where}: {kind} has no value")
    return Exclusion(kind, value, why.strip())  # type: ignore[arg-type]


def add_exclusions(path: Path, entries: Sequence[Exclusion]) -> None:
    """Append what a list does not have yet; its own lines, columns and line ends stay.

    Raises:
        ValueError: see `read_exclusions`.
    """
    seen = {(entry.kind, _key(entry.kind, entry.value)) for entry in read_exclusions(path)}
    text = path.read_bytes().decode()
    end = "\r\n" if "\r\n" in text else "\n"
    columns = written_columns(text)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator=end)
    for entry in entries:
        key = (entry.kind, _key(entry.kind, entry.value))
        if key not in seen:
            seen.add(key)
            values = {"kind": entry.kind, "value": entry.value, "why": entry.why}
            writer.writerow([values.get(name, "") for name in columns])
    gap = "" if text.endswith("\n") else end
    if out.getvalue():
        write_text(path, text + gap + out.getvalue())


def _name(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split()).casefold()


def _address(text: str) -> str:
    """An address without scheme, "www." and closing slash: what differs between spellings."""
    text = re.sub(r"^[a-z][a-z0-9+.-]*://", "", text.strip(), flags=re.IGNORECASE)
    host, slash, rest = text.partition("/")
    host = host.casefold().removeprefix("www.")
    return f"{host}{slash}{rest}".split("#")[0].rstrip("/")


def _host(text: str) -> str:
    text = text.strip()
    try:
        host = urlsplit(text if "://" in text else f"//{text}").hostname or ""
    except ValueError:
        return ""
    return host.casefold().removeprefix("www.").rstrip(".")


def _key(kind: str, value: str) -> str:
    if kind == "photographer":
        return _name(value)
    if kind == "url":
        return _address(value)
    if kind == "host":
        return _host(value)
    return value.casefold() if re.fullmatch(r"[0-9A-Fa-f]{64}", value) else value


class Exclusions:
    """Entries, ready to be asked about many rows."""

    COLUMNS = (
        *("image_id", "uri", "photographer", "photographer_url", "image_url", "work_url"),
        OTHER_CREDITS,
    )
    """Of a manifest, as far as it has them."""

    def __init__(self, entries: Iterable[Exclusion]) -> None:
        """Sort the entries by kind."""
        self.entries = tuple(entries)
        self._keys: dict[str, set[str]] = {kind: set() for kind in KINDS}
        for entry in self.entries:
            self._keys[entry.kind].add(_key(entry.kind, entry.value))

    def mask(self, table: pd.DataFrame) -> np.ndarray:
        """(rows,) bool: which rows of a part of a manifest an entry names.

        A photographer is meant with and without a remark in brackets ("Ann Lee (Unsplash)"); a
        host with all below it. Other copies of the same bytes are asked as well.
        """
        found = self._named(table)
        rows, credits = _of_copies(table)
        found[rows[self._named(credits)]] = True
        return found

    def _named(self, table: pd.DataFrame) -> np.ndarray:
        found = np.zeros(len(table), dtype=bool)
        for kind, column in self._asked(table):
            keys, keys_in = self._keys[kind], _KEYS_IN[kind]
            found |= _told(table[column], lambda text: not keys.isdisjoint(keys_in(text)))  # noqa: B023
        return found

    def _asked(self, table: pd.DataFrame) -> Iterator[tuple[Kind, str]]:
        """Kinds that have entries, with each column of the table that tells of them."""
        for kind in KINDS:
            for column in _COLUMNS_OF[kind]:
                if self._keys[kind] and column in table:
                    yield kind, column

    def images_by_entry(self, manifest: Path) -> list[set[str]]:
        """As `images`, of each entry in their order."""
        found: dict[tuple[str, str], set[str]] = defaultdict(set)
        for batch in manifest_batches(manifest, list(self.COLUMNS)):
            part = pa.Table.from_batches([batch]).to_pandas()
            own = part["image_id"].astype(str).to_numpy()
            rows, credits = _of_copies(part)
            for table, images in ((part, own), (credits, own[rows])):
                for kind, column in self._asked(table):
                    codes, texts = pd.factorize(table[column].astype(object), use_na_sentinel=True)
                    for code, text in enumerate(texts):
                        for key in self._keys[kind].intersection(_KEYS_IN[kind](str(text))):
                            found[kind, key].update(images[codes == code])
        return [found[one.kind, _key(one.kind, one.value)] for one in self.entries]

    def images(self, manifest: Path) -> set[str]:
        """image_id of all rows of a manifest that an entry names; read batch by batch."""
        return self._look(manifest)[0]

    def column(self, manifest: Path) -> np.ndarray | None:
        """(rows,) bool of a manifest, or None where no row is named.

        Equal bytes are excluded whoever else is credited for them.
        """
        if not self.entries:
            return None
        images, ids = self._look(manifest)
        if not images:
            return None
        return np.asarray(pd.Series(ids).isin(images).to_numpy(dtype=bool))

    def _look(self, manifest: Path) -> tuple[set[str], list[str]]:
        images: set[str] = set()
        ids: list[str] = []
        for batch in manifest_batches(manifest, list(self.COLUMNS)):
            part = pa.Table.from_batches([batch]).to_pandas()
            own = part["image_id"].astype(str)
            images.update(own[self.mask(part)])
            ids += own.tolist()
        return images, ids


def _of_copies(table: pd.DataFrame) -> tuple[np.ndarray, pd.DataFrame]:
    """Credits of other copies of the same bytes, and the position of the row that each is in."""
    others = [(row, other) for row, several in other_credits(table) for other in several]
    rows = np.array([row for row, _ in others], dtype=int)
    return rows, pd.DataFrame([other for _, other in others])


def _and_above(host: str) -> tuple[str, ...]:
    """A host and every domain that it is below."""
    parts = host.split(".")
    return tuple(".".join(parts[start:]) for start in range(len(parts)))


_URLS = ("image_url", "work_url", "photographer_url")
_COLUMNS_OF: dict[Kind, tuple[str, ...]] = {
    "identity": ("image_id", "uri"),
    "url": _URLS,
    "photographer": ("photographer",),
    "host": _URLS,
}
_KEYS_IN: dict[Kind, Callable[[str], tuple[str, ...]]] = {
    "identity": lambda text: (text,),
    "url": lambda text: (_address(text),),
    "photographer": lambda text: (_name(text), _name(_REMARK.sub("", text))),
    "host": lambda text: _and_above(_host(text)),
}
"""Keys of the entries that mean a row with this text in one of those columns."""
