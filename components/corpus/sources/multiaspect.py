"""The released MultiAspect-4K-1M metadata: JSON shards, each a list of records.

1,008 shards hold 1,007,230 records; `image_url` and `en_caption` are confirmed keys, attribution is
filled on about 98% (UltraFlux release notes). Other keys are found through the alias table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.corpus.sources.url_lists import (
    READ_ERRORS,
    SourceRecord,
    open_text,
    parse_json,
    place_of,
    read_problem,
    source_files,
)

SHARD_ENDINGS = (".json", ".json.gz")


def _records(shard: Any) -> list[Any] | None:
    """The list of a shard, also as the only list of an object ({"data": [...]})."""
    if isinstance(shard, list):
        return shard
    if isinstance(shard, dict):
        lists = [value for value in shard.values() if isinstance(value, list)]
        if len(lists) == 1:
            return lists[0]
    return None


def read_metadata_shards(source: Path, shown: str) -> Iterator[SourceRecord]:
    """Every record of every shard; a shard that cannot be read is one broken record.

    Raises:
        ValueError: no shards (see `source_files`).
    """
    for path in source_files(source, SHARD_ENDINGS, shown):
        name = place_of(path, source)
        try:
            with open_text(path) as file:
                records = _records(parse_json(file.read()))
        except READ_ERRORS as problem:
            yield SourceRecord(name, None, read_problem(problem))
            continue
        except ValueError as problem:
            yield SourceRecord(name, None, f"broken shard: {problem}")
            continue
        if records is None:
            yield SourceRecord(name, None, "broken shard: not a list of records")
            continue
        for number, values in enumerate(records):
            place = f"{name}:{number}"
            if isinstance(values, dict):
                yield SourceRecord(place, values)
            else:
                yield SourceRecord(place, None, f"a {type(values).__name__}, not an object")
