"""Columns of a manifest on disk, so that a question costs what it asks for and no more.

Captions are nine tenths of a manifest. Nothing here holds more than a batch of them: of their
lengths only the numbers stay, of text that is only compared a digest, and text of few values is
coded by value.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from components.corpus.manifest import SCHEMA, check_keys, check_version
from components.files.parquet_files import GROUP_ROWS

_BUFFER = 2**20

WORDS = "caption_words"
CHARACTERS_ZH = "caption_characters_zh"
PRESENT = "present"
# Python's white space in RE2's terms, whose own \\s is that of ASCII.
_WORD = r"[^\s\v\x1c-\x1f\x{85}\p{Z}]+"
_LENGTHS = {WORDS: "caption_en", CHARACTERS_ZH: "caption_zh"}
"""Columns that are no part of a manifest, and the captions that they measure."""

# Text that nearly every row has for itself; all other text is coded by value.
_OF_ITS_OWN = frozenset(
    {
        "image_id",
        "uri",
        "pdq_hash",
        "duplicate_of",
        "person_boxes",
        "caption_en",
        "caption_zh",
        "image_url",
        "work_url",
        "record_id",
        "source_fields",
        "other_credits",
    }
)


def _is_text(name: str) -> bool:
    return name in SCHEMA.names and pa.types.is_string(SCHEMA.field(name).type)


def is_coded(name: str) -> bool:
    """Whether a column of the schema is text of few values."""
    return _is_text(name) and name not in _OF_ITS_OWN


def manifest_batches(
    path: Path, columns: Sequence[str], *, code_text: bool = True
) -> Iterator[pa.RecordBatch]:
    """Batches of a manifest; columns that it lacks are left out.

    Args:
        path: manifest.
        columns: names of the schema.
        code_text: text of few values comes as dictionaries.

    Raises:
        ValueError: not a manifest, or of another schema version.
    """
    present = check_version(path).names
    coded = [name for name in columns if code_text and is_coded(name) and name in present]
    # Pages are read as they are needed: older files hold a million rows in one group.
    with pq.ParquetFile(path, read_dictionary=coded, buffer_size=_BUFFER) as file:
        known = [name for name in columns if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=GROUP_ROWS, columns=known):
            check_keys(batch, path)
            yield batch


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column of the schema; null where the manifest lacks it."""
    if name in batch.schema.names:
        return batch[name]
    return pa.nulls(len(batch), SCHEMA.field(name).type)


def _presence(values: pa.Array) -> pa.Array:
    # One byte a row says what the page asks of a URL of a hundred.
    codes = pa.nulls(len(values), pa.int8())
    codes = pc.if_else(pc.is_valid(values), pa.scalar(0, pa.int8()), codes)
    return pa.DictionaryArray.from_arrays(codes, pa.array([PRESENT]))


def _length(name: str, captions: pa.Array) -> pa.Array:
    if name == WORDS:
        return pc.count_substring_regex(captions, _WORD)
    return pc.utf8_length(captions)


def read_columns(
    path: Path, columns: Sequence[str], *, kept_only: bool = False, presence: Collection[str] = ()
) -> pd.DataFrame:
    """A frame of some columns; text of few values is categorical.

    Args:
        path: manifest.
        columns: names of the schema, and `WORDS` and `CHARACTERS_ZH`: words of the English and
            characters of the Chinese caption. Null where an older manifest lacks them; what no
            schema knows is left out.
        kept_only: leave out the rows that are not kept.
        presence: those of which only matters where there is a value; text is `PRESENT` there.

    Raises:
        ValueError: not a manifest, or of another schema version.
    """
    wanted = list(dict.fromkeys(columns))
    presence = {name for name in presence if _is_text(name)}
    needed = [_LENGTHS.get(name, name) for name in wanted]
    if kept_only:
        needed.append("kept")
    parts: dict[str, list[pa.Array]] = {name: [] for name in wanted}
    for batch in manifest_batches(path, list(dict.fromkeys(needed))):
        if kept_only:
            batch = batch.filter(pc.fill_null(_column(batch, "kept"), False))
        for name in wanted:
            if name in _LENGTHS:
                parts[name].append(_length(name, _column(batch, _LENGTHS[name])))
            elif name in presence and name in batch.schema.names:
                parts[name].append(_presence(batch[name]))
            elif name in SCHEMA.names:
                parts[name].append(_column(batch, name))
    frame = {}
    for name in wanted:
        # Popped: a column's parts are free as soon as it is a series, or both would be in memory.
        if chunks := parts.pop(name):
            frame[name] = _series(pa.chunked_array(chunks))
        elif name in SCHEMA.names or name in _LENGTHS:
            # A manifest without a row has no batch either.
            kind = SCHEMA.field(name).type if name in SCHEMA.names else pa.int32()
            frame[name] = _series(pa.chunked_array([], kind))
    return pd.DataFrame(frame)


def _series(column: pa.ChunkedArray) -> pd.Series:
    if pa.types.is_dictionary(column.type):
        column = column.unify_dictionaries()
    return column.to_pandas()


def frame_of(batch: pa.RecordBatch, columns: Sequence[str]) -> pd.DataFrame:
    """Columns of a batch; null where an older manifest lacks them."""
    arrays = [_column(batch, name) for name in columns]
    frame: pd.DataFrame = pa.Table.from_arrays(arrays, names=list(columns)).to_pandas()
    return frame


class ManifestOnDisk:
    """A manifest that is read a column at a time, for comparisons of whole versions.

    It stands for a frame where only `len`, `columns` and single columns are asked for. Text that
    is neither coded nor needed by its value is a column of 64-bit digests: equal where the text
    is, 0 where it is missing.
    """

    def __init__(self, path: Path, values_of: Collection[str]) -> None:
        """Look at the footer.

        Args:
            path: manifest.
            values_of: text columns that are wanted as they are.

        Raises:
            ValueError: not a manifest, or of another schema version.
        """
        check_version(path)
        self._path = path
        self._values_of = frozenset(values_of)
        footer = pq.read_metadata(path)
        self._rows = footer.num_rows
        self.columns = footer.schema.to_arrow_schema().names

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, name: str) -> pd.Series:
        if not _is_text(name) or is_coded(name) or name in self._values_of:
            return read_columns(self._path, [name])[name]
        digests = [text_digests(batch[name]) for batch in manifest_batches(self._path, [name])]
        return pd.Series(np.concatenate([np.empty(0, np.uint64), *digests]))


def text_digests(text: pa.Array) -> np.ndarray:
    """(N,) uint64 of text, equal where it is; 0 where there is none."""
    digest = xxhash.xxh3_64_intdigest
    # As bytes, which is what is hashed: no caption is decoded for it.
    values = (0 if value is None else digest(value) for value in text.cast(pa.binary()).to_pylist())
    return np.fromiter(values, np.uint64, len(text))
