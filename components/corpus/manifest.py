"""The manifest: one Parquet row per candidate photograph, with a versioned schema.

Stages fill it from left to right; a column that no stage has filled yet is null. Tables are pandas
frames in memory: missing numbers are NaN and missing text is NaN or None, as pandas reads Parquet.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from components.files.parquet_files import write_parquet

SCHEMA_VERSION = 5
OLDEST_READ = 3
"""Version 4 added what is stored beside what is seen, and `drawing_score`; version 5 added
`other_credits`. Older manifests are read with those columns null; sizes of version 3 are as
stored."""
_VERSION_KEY = b"ultraflux.manifest.schema_version"

SCHEMA = pa.schema(
    [
        # Identity: sha256 of the original bytes; `uri` is unique, duplicates share an image_id.
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        # Header. Sizes are as seen (upright); what the file stores stands behind them.
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("megapixels", pa.float64()),
        ("aspect_ratio", pa.float64()),
        ("stored_width", pa.int32()),
        ("stored_height", pa.int32()),
        # EXIF's, 1 to 8; the profile's name; bits per channel in the file.
        ("orientation", pa.int32()),
        ("color_space", pa.string()),
        ("bit_depth", pa.int32()),
        ("has_alpha", pa.bool_()),
        ("bucket", pa.string()),
        ("bucket_height", pa.int32()),
        ("bucket_width", pa.int32()),
        ("format", pa.string()),
        ("bytes_per_pixel", pa.float64()),
        ("integrity", pa.string()),
        # What was converted or is wrong beside the pixels; no reason to reject.
        ("decode_note", pa.string()),
        # Classical signals.
        # Mean transparency, 0 opaque to 1.
        ("alpha_fraction", pa.float64()),
        ("flat_fraction", pa.float64()),
        ("entropy_bits", pa.float64()),
        ("glcm_score", pa.float64()),
        ("glcm_entropy_bits", pa.float64()),
        ("jpeg_quality", pa.int32()),
        # 256 bits as 64 hexadecimal digits; quality 0 to 100.
        ("pdq_hash", pa.string()),
        ("pdq_quality", pa.int32()),
        ("duplicate_of", pa.string()),
        # Scores, each with the name of what made it and a digest of its weights.
        ("nsfw_score", pa.float64()),
        ("nsfw_scorer", pa.string()),
        ("nsfw_weights", pa.string()),
        # 0 (a photograph) to 1 (a drawing), by the scorer of nsfw_score where it tells them apart.
        ("drawing_score", pa.float64()),
        ("qalign", pa.float64()),
        ("quality_score", pa.float64()),
        ("quality_scorer", pa.string()),
        ("quality_weights", pa.string()),
        ("aesthetic", pa.float64()),
        ("aesthetic_scorer", pa.string()),
        ("aesthetic_weights", pa.string()),
        ("person_count", pa.int32()),
        ("person_boxes", pa.string()),
        ("person_scorer", pa.string()),
        ("person_weights", pa.string()),
        ("is_character", pa.bool_()),
        ("channel", pa.string()),
        # Captions.
        ("caption_en", pa.string()),
        ("caption_zh", pa.string()),
        ("caption_status", pa.string()),
        ("caption_model", pa.string()),
        ("translation_model", pa.string()),
        # Decisions.
        ("split", pa.string()),
        ("kept", pa.bool_()),
        ("reject_reason", pa.string()),
        ("reject_value", pa.float64()),
        ("reject_threshold", pa.float64()),
        # Provenance.
        ("source", pa.string()),
        # Which query found it: the human channel has queries of its own.
        ("query", pa.string()),
        ("image_url", pa.string()),
        ("work_url", pa.string()),
        ("photographer", pa.string()),
        ("photographer_url", pa.string()),
        ("license", pa.string()),
        # JSON list of what other copies of the same bytes are credited with, where it differs.
        ("other_credits", pa.string()),
        # What the source's own record says: its identifier, and a JSON object of all its fields
        # that no other column takes.
        ("record_id", pa.string()),
        ("source_fields", pa.string()),
    ],
    metadata={_VERSION_KEY: str(SCHEMA_VERSION).encode()},
)


def to_arrow(frame: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    """Convert a frame to `schema`: columns in its order, absent ones null, NaN as null.

    Raises:
        ValueError: a column that the schema does not know, a type that does not fit, or a null
            where the schema allows none.
    """
    unknown = sorted(set(frame.columns) - set(schema.names))
    if unknown:
        raise ValueError(f"columns {unknown} are not in the schema {schema.names}")
    columns = []
    for field in schema:
        if field.name not in frame.columns:
            column = pa.nulls(len(frame), field.type)
        else:
            try:
                # `from_pandas`: NaN becomes null, which a plain conversion would store as a number.
                column = pa.Array.from_pandas(_uncoded(frame[field.name]), type=field.type)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as problem:
                raise ValueError(
                    f"column {field.name}: not {field.type}: {str(problem).splitlines()[0]}"
                ) from None
        if not field.nullable and column.null_count:
            raise ValueError(f"column {field.name}: {column.null_count} values are missing")
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)


def _uncoded(column: pd.Series) -> pd.Series:
    """Coded text as text."""
    return column.astype(object) if isinstance(column.dtype, pd.CategoricalDtype) else column


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a manifest.

    Args:
        frame: any subset of the schema's columns, at least image_id and uri.
        path: Parquet file; replaced at once when complete.

    Raises:
        ValueError: see `to_arrow`.
    """
    write_parquet(to_arrow(frame, SCHEMA), path)


def read_table(path: Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a manifest.

    Args:
        path: Parquet file.
        columns: names to read, in this order; unknown ones are left out. All in schema order when
            None.

    Returns:
        columns that an older version lacks are null.

    Raises:
        ValueError: not a manifest, or of a schema version that this code does not read; a row
            without image_id or uri where they are asked for.
    """
    present = check_version(path).names
    known = [
        name for name in (SCHEMA.names if columns is None else columns) if name in SCHEMA.names
    ]
    table = pq.read_table(path, columns=[name for name in known if name in present])
    for position, name in enumerate(known):
        if name not in present:
            field = SCHEMA.field(name)
            table = table.add_column(position, field, pa.nulls(len(table), field.type))
    check_keys(table, path)
    return table.to_pandas()


def check_keys(rows: pa.Table | pa.RecordBatch, path: Path) -> None:
    """Refuse rows without what every row of a manifest has.

    Raises:
        ValueError: values of a column that must not be null are missing.
    """
    for name in rows.schema.names:
        if not SCHEMA.field(name).nullable and (missing := rows[name].null_count):
            raise ValueError(f"{path}: column {name}: {missing} values are missing")


def check_version(path: Path) -> pa.Schema:
    """Refuse what is no manifest that this code reads.

    Returns:
        the file's own schema, which lacks columns if it is of an older version.

    Raises:
        ValueError: not a manifest, of another schema version, or text in a column of numbers.
    """
    try:
        schema = pq.read_schema(path)
        version = (schema.metadata or {}).get(_VERSION_KEY)
    except pa.ArrowInvalid:
        raise ValueError(f"{path}: not a Parquet file") from None
    if version is None:
        raise ValueError(f"{path}: not a manifest (no schema version in its metadata)")
    if not (version.isdigit() and OLDEST_READ <= int(version) <= SCHEMA_VERSION):
        raise ValueError(
            f"{path}: manifest schema version {version.decode()}, this code reads "
            f"{OLDEST_READ} to {SCHEMA_VERSION}; run the stage that wrote it again"
        )
    for column in schema:
        if column.name in SCHEMA.names and not pa.types.is_null(column.type):
            found, expected = _kind(column.type), _kind(SCHEMA.field(column.name).type)
            if found != expected:
                raise ValueError(f"{path}: column {column.name} must be {expected}, not {found}")
    return schema


def _kind(kind: pa.DataType) -> str:
    """What a column holds, however it is stored."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    return "numbers" if pa.types.is_integer(kind) or pa.types.is_floating(kind) else str(kind)
