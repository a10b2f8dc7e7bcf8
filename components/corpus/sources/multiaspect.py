"""The released MultiAspect-4K-1M metadata: JSON shards, each a list of records.

1,008 shards hold 1,007,230 records; `image_url` and `en_caption` are confirmed keys, attribution is
filled on about 98% (UltraFlux release notes). Other keys are found through the alias table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.corpus.sources.records.address_columns import (
    address_column,
    described,
    with_address,
)
from components.corpus.sources.records.json_values import parse_json
from components.corpus.sources.records.source_records import (
    SourceEnd,
    SourceItem,
    SourceRecord,
    place_of,
    shown_path,
    source_files,
)
from components.corpus.sources.records.text_lines import (
    READ_ERRORS,
    open_text,
    read_problem,
    wrong_encoding,
)
from components.settings.corpus import ListSettings

SHARD_ENDINGS = (".json", ".json.gz")
_JSON_LINES = "broken shard: JSON lines; name it .jsonl and set ingest.kind to urls"


class _Misread(str):
    """Why a shard gives nothing, where settings are the remedy."""


def _records(shard: Any) -> list[Any] | None:
    """The list of a shard, also as the only list of an object ({"data": [...]})."""
    if isinstance(shard, list):
        return shard
    if isinstance(shard, dict):
        lists = [value for value in shard.values() if isinstance(value, list)]
        # Of several lists none is obviously the records.
        if len(lists) == 1:
            return lists[0]
    return None


def _shard(path: Path, lists: ListSettings) -> list[Any] | str:
    """The items of a shard, or why there are none."""
    try:
        with open_text(path, lists.encoding) as file:
            text = file.read()
        records = _records(parse_json(text))
    except UnicodeError as problem:
        return _Misread(wrong_encoding(problem, lists.encoding))
    except READ_ERRORS as problem:
        return read_problem(problem)
    except ValueError as problem:
        # A common mistake with a remedy of its own; "extra data" would not name it.
        start = text.lstrip().partition("\n")[0]
        if start.startswith("{") and start.rstrip().endswith("}"):
            return _Misread(_JSON_LINES)
        return f"broken shard: {problem}"
    return "broken shard: not a list of records" if records is None else records


def _refuse_without_addresses(
    paths: list[Path], source: Path, shown: str, lists: ListSettings
) -> None:
    """Look at the first shard that holds objects: the others are read when it is their turn.

    Raises:
        ValueError: none of its objects has a field of addresses, or it is no shard but a list.
    """
    for path in paths:
        found = _shard(path, lists)
        if isinstance(found, _Misread):
            raise ValueError(f"{shown_path(path, source, shown)}: {found}")
        # A broken shard is a string here, its characters no objects: the next one is looked at.
        objects = [item for item in found if isinstance(item, dict)]
        if not objects:
            continue
        names = dict.fromkeys(name for item in objects for name in item)
        if address_column(list(names), lists.url_column) is None:
            called = "" if lists.url_column is None else f" called {lists.url_column}"
            raise ValueError(
                f"{shown_path(path, source, shown)}: no field of addresses{called}; fields are "
                f"{described(names)}; set ingest.lists.url_column to the one that holds addresses"
            )
        return


def read_metadata_shards(source: Path, shown: str, lists: ListSettings) -> Iterator[SourceItem]:
    """Every record of every shard; a shard that cannot be read is one broken record.

    Args:
        source: shard, or folder of shards.
        shown: how messages name it.
        lists: encoding and field of addresses, where they are not the usual ones.

    Raises:
        ValueError: no shards (see `source_files`), or no addresses in them; before the first
            record.
    """
    paths = source_files(source, SHARD_ENDINGS, shown)
    _refuse_without_addresses(paths, source, shown, lists)
    return _all_items(paths, source, lists)


def _all_items(paths: list[Path], source: Path, lists: ListSettings) -> Iterator[SourceItem]:
    for path in paths:
        name = place_of(path, source)
        found = _shard(path, lists)
        if isinstance(found, str):
            # Nobody knows how many records it held: it is one loss, outside the count of records.
            yield SourceRecord(name, None, found, units=0)
            yield SourceEnd(name, "records", 0)
            continue
        for number, values in enumerate(found):
            place = f"{name}:{number}"
            if isinstance(values, dict):
                yield SourceRecord(place, with_address(values, lists.url_column))
            else:
                yield SourceRecord(place, None, f"a {type(values).__name__}, not an object")
        yield SourceEnd(name, "records", len(found))
