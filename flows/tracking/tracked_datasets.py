"""The tables that a stage read and wrote, as MLflow datasets.

A dataset's digest is the DVC hash (md5) of its file and its name the path, so that the run that
wrote a table and those that read it show the same dataset. Only Parquet footers are read: a corpus
of a million rows costs no memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.files.weight_folders import file_digest
from flows.records.records import RunDescription, RunResult

if TYPE_CHECKING:
    import pyarrow
    from mlflow.entities import Dataset, DatasetInput

_MOST_TABLES = 64
"""Tables per run at most; MLflow's request has a limit, shards are not tables."""


def dataset_inputs(
    root: Path, run: RunDescription, result: RunResult, outputs: dict[str, str]
) -> list[DatasetInput]:
    """Tables below `data/` with their context, `input` or `output`.

    Args:
        root: the clone.
        run: names what was read, by DVC hash.
        result: names what was written.
        outputs: DVC hash by path of what was written, as far as it is known yet.
    """
    from mlflow.entities import DatasetInput, InputTag

    written = {}
    for path in result.datasets.values():
        file = root / path
        if path in outputs or file.is_file():
            written[path] = outputs.get(path) or file_digest(file, "md5")
    found = [
        *((path, md5, "input") for path, md5 in run.inputs.items() if _is_table(path)),
        *((path, md5, "output") for path, md5 in written.items()),
    ]
    return [
        DatasetInput(_dataset(root, path, md5), [InputTag("mlflow.data.context", context)])
        for path, md5, context in found[:_MOST_TABLES]
    ]


def _is_table(path: str) -> bool:
    return path.startswith("data/") and path.endswith(".parquet")


def _dataset(root: Path, path: str, md5: str) -> Dataset:
    from mlflow.entities import Dataset

    schema = profile = None
    file = root / path
    # The clone may be further by now; another version's columns would be wrong.
    if file.is_file() and file_digest(file, "md5") == md5:
        schema, profile = _described(file)
    return Dataset(
        name=path.removeprefix("data/").removesuffix(".parquet"),
        digest=md5,
        source_type="local",
        source=json.dumps({"uri": path}),
        schema=schema,
        profile=profile,
    )


def _described(file: Path) -> tuple[str, str]:
    """(schema, profile) as MLflow's own tables have them, from the file's footer."""
    import pyarrow.parquet as pq

    footer = pq.read_metadata(file)
    columns = list(_columns(footer.schema.to_arrow_schema()))
    profile = {"num_rows": footer.num_rows, "num_elements": footer.num_rows * footer.num_columns}
    return json.dumps({"mlflow_colspec": columns}), json.dumps(profile)


def _columns(schema: pyarrow.Schema) -> Iterator[dict[str, Any]]:
    from mlflow.types.schema import ColSpec

    for field in schema:
        if (kind := _type(field.type)) is not None:
            yield ColSpec(kind, field.name, required=not field.nullable).to_dict()


def _type(kind: pyarrow.DataType) -> Any:
    """MLflow's type; None for what it has no name for."""
    import pyarrow.types as types
    from mlflow.types import DataType
    from mlflow.types.schema import Array

    if types.is_list(kind) or types.is_large_list(kind):
        inner = _type(kind.value_type)
        return None if inner is None else Array(inner)
    if types.is_dictionary(kind):
        return _type(kind.value_type)
    tests = (
        (types.is_boolean, DataType.boolean),
        (types.is_float32, DataType.float),
        (types.is_floating, DataType.double),
        (types.is_int64, DataType.long),
        (types.is_uint64, DataType.long),
        (types.is_integer, DataType.integer),
        (types.is_string, DataType.string),
        (types.is_large_string, DataType.string),
        (types.is_binary, DataType.binary),
        (types.is_large_binary, DataType.binary),
        (types.is_timestamp, DataType.datetime),
    )
    return next((name for is_kind, name in tests if is_kind(kind)), None)
