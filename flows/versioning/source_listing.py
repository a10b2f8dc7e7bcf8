"""The stage `source`: it runs whenever it is asked for, and is stale only when files have changed.

To DVC it is `always_changed`: nobody tells DVC of a new photograph, and looking for itself it would
read every file. Whether there is anything to do is asked here, by names, sizes and times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.settings.schema import SettingsError, load_settings
from flows.versioning.lock_hashes import out_hashes

SOURCE = "source"
"""The stage's name."""
TABLE = "data/source/listing.parquet"
ALWAYS_CHANGED = "always changed"
"""What DVC's status says of the stage."""


def source_changes(root: Path, entry: Mapping[str, Any], *, read: bool = False) -> str:
    """How `ingest.source` differs from the table in an entry of dvc.lock; empty for not at all.

    Args:
        root: the clone.
        entry: what dvc.lock says of the stage.
        read: read what is new, so that the answer is about contents: where another clone made the
            table, names and times of this one say nothing.
    """
    # Commands that ask nothing of a source need no pandas and no decoders.
    from components.corpus.listing.source_table import STATE, describe_source, known_table
    from components.engine.map_items import EngineLimits

    try:
        settings = load_settings(root / "params.yaml")
        table = known_table(settings.ingest, root)
        if table is None and read:
            here = root / STATE / "here.parquet"
            try:
                describe_source(settings.ingest, here, root=root, limits=EngineLimits.of(settings))
            finally:
                # What it says of the table is noted.
                here.unlink(missing_ok=True)
            table = known_table(settings.ingest, root)
    except (SettingsError, ValueError) as problem:
        # The stage says it again, as its own error.
        return str(problem)
    same = table is not None and out_hashes(entry).get(TABLE) == table
    return "" if same else f"files in {settings.ingest.source}"


def reads_source(stage: str, paths: Sequence[str]) -> bool:
    """Whether a stage reads files under `ingest.source`, which DVC does not know of.

    Args:
        stage: its name.
        paths: its dependencies.
    """
    return stage == SOURCE or TABLE in paths
