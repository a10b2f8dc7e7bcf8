"""Fields of foreign metadata records: which key means what, and how well they are filled.

Nothing is thrown away: keys that are not known, and values of known keys that cannot be used, stay
with the record as "extra".
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from components.corpus.sources.records.ledger import Ledger
from components.files.parquet_files import storable

# Manifest column (or record_id) -> keys that mean it, best first. Keys are compared in lower case
# with "-" and " " read as "_". The released MultiAspect-4K-1M metadata confirms image_url and
# en_caption; the others are what photo services and public image-text lists use.
ALIASES: dict[str, tuple[str, ...]] = {
    "image_url": (
        "image_url",
        "url",
        "img_url",
        "imageurl",
        "photo_image_url",
        "image_src",
        "image_link",
        "download_url",
        "original_url",
    ),
    "caption_en": ("en_caption", "caption_en", "english_caption", "caption", "text", "txt"),
    "caption_zh": ("zh_caption", "caption_zh", "chinese_caption", "cn_caption"),
    "query": ("query", "search_query", "retrieval_query", "search_term", "keyword"),
    "work_url": (
        "work_url",
        "photo_url",
        "page_url",
        "landing_url",
        "foreign_landing_url",
        "source_url",
    ),
    "photographer": (
        "photographer",
        "photographer_name",
        "author",
        "author_name",
        "artist",
        "creator",
        "user_name",
    ),
    "photographer_url": (
        "photographer_url",
        "photographer_link",
        "author_url",
        "artist_url",
        "creator_url",
        "user_url",
    ),
    "license": ("license", "licence", "license_name", "license_url", "rights"),
    "source": ("source", "provider", "site", "dataset", "platform"),
    "record_id": ("id", "record_id", "uid", "uuid", "image_id", "photo_id", "key"),
}
_IDENTIFIERS = ("record_id",)


def normalise_key(key: str) -> str:
    """The spelling in which keys are compared."""
    return key.strip().lower().replace("-", "_").replace(" ", "_")


def _is_missing(value: Any) -> bool:
    """Null, NaN in any spelling of a table export, or blank text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and value.strip().lower() in {"", "nan", "null", "none"}


def _plain(value: Any) -> Any:
    """The value as JSON can hold it; NaN and infinities as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {storable(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return storable(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    return storable(str(value))


@dataclass(frozen=True)
class Fields:
    """A record, read."""

    known: dict[str, str]
    """By name in `ALIASES`; only usable values."""
    extra: dict[str, Any]
    """Everything else under its own key, JSON-able."""
    wrong_type: tuple[str, ...]
    """Names in `ALIASES` whose value is no text (it is in `extra`)."""


def read_fields(record: Mapping[Any, Any]) -> Fields:
    """Sort the keys of a record; of several keys with one meaning the best filled one counts."""
    spelled: dict[str, str] = {}
    for key in record:
        # Of "URL" and "url" in one record the first counts; the other stays in `extra`.
        spelled.setdefault(normalise_key(str(key)), key)
    known: dict[str, str] = {}
    wrong: list[str] = []
    used: set[Any] = set()
    for name, aliases in ALIASES.items():
        unusable = False
        for alias in aliases:
            if alias not in spelled:
                continue
            value = record[spelled[alias]]
            # Blank is an answer with nothing in it: the next spelling is asked, and no `extra` is
            # made of it.
            if _is_missing(value):
                used.add(spelled[alias])
                continue
            # Many lists have ids as numbers. Elsewhere a number is a wrong column; bool is a kind
            # of int in Python.
            if name in _IDENTIFIERS and isinstance(value, int) and not isinstance(value, bool):
                value = str(value)
            if not isinstance(value, str):
                unusable = True
                continue
            known[name] = storable(value).strip()
            used.add(spelled[alias])
            break
        if unusable and name not in known:
            wrong.append(name)
    extra = {storable(str(key)): _plain(value) for key, value in record.items() if key not in used}
    return Fields(known, extra, tuple(wrong))


def extra_json(extra: Mapping[str, Any]) -> str:
    """Unknown keys as one line of JSON, in a fixed order."""
    # Sorted: equal records give equal bytes, whatever order their file has.
    return json.dumps(extra, sort_keys=True, ensure_ascii=False)


@dataclass
class Coverage:
    """How well the fields of a source are filled; `report` is what a user reads."""

    records: int = 0
    filled: Counter[str] = field(default_factory=Counter)
    wrong_type: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    ledger: Ledger = field(default_factory=Ledger)
    kept: int = 0
    """Rows of the manifest."""
    losses: dict[str, int] = field(default_factory=dict)
    """Candidates that are not there, by cause; with `kept`, all of them."""
    remark: str | None = None
    """What a person should look at though nothing is lost by it; one line."""

    def add(self, fields: Fields) -> None:
        """Count one record."""
        self.records += 1
        self.filled.update(fields.known.keys())
        self.wrong_type.update(fields.wrong_type)
        self.unknown.update(fields.extra.keys())

    def report(self) -> dict[str, Any]:
        """Share of records with each known field, wrong types, unknown keys, problems, ledger."""
        share = {
            name: self.filled[name] / self.records if self.records else 0.0 for name in ALIASES
        }
        return {
            "records": self.records,
            "field_share": share,
            "wrong_type": dict(sorted(self.wrong_type.items())),
            "unknown_keys": dict(sorted(self.unknown.items())),
            "problems": dict(sorted(self.problems.items())),
            "ledger": self.ledger.report(),
            "kept": self.kept,
            "losses": dict(sorted(self.losses.items())),
            "remark": self.remark,
        }
