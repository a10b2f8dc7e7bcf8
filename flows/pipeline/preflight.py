"""What would otherwise fail late, checked before anything starts."""

from __future__ import annotations

import os
from pathlib import Path

from components.settings.schema import load_settings
from flows.versioning import graph as versioning
from flows.versioning.source_listing import SOURCE

PHOTO_SOURCES = {
    "folder": "photographs",
    "urls": "CSV, JSONL or Parquet lists",
    "webdataset": "tar archives",
    "multiaspect": "JSON shards",
}
"""What `ingest.source` names, by `ingest.kind`."""


class PipelineRefused(RuntimeError):
    """The pipeline cannot start here; one line."""


def preflight(root: Path) -> None:
    """Check what would otherwise fail late.

    Raises:
        PipelineRefused: the photographs are missing, a folder that must be written cannot be, a
            cost cap has no prices, or a rule asks for scores that no scorer gives.
        SettingsError: params.yaml is not valid.
    """
    settings = load_settings(root / "params.yaml")
    ingest = settings.ingest
    if (missing := settings.caption.missing_prices()) is not None:
        raise PipelineRefused(missing)
    if (unscored := settings.unscored_rule()) is not None:
        raise PipelineRefused(unscored)
    source = root / ingest.source
    # A frozen `source`: the photographs may be gone, the image store holds them.
    if not versioning.is_frozen(root, SOURCE) and not (
        source.is_dir() if ingest.kind == "folder" else source.exists()
    ):
        wanted = "folder" if ingest.kind == "folder" else "file or folder"
        tracked = (root / f"{ingest.source}.dvc").is_file()
        raise PipelineRefused(
            f"ingest.source = {ingest.source}: no such {wanted} below {root}; "
            + (f"`dvc pull {ingest.source}` brings it, or " if tracked else "")
            + f"set it in params.yaml to a {wanted} of {PHOTO_SOURCES[ingest.kind]}"
        )
    for name in ("data", "runs", ".dvc/tmp", ".dvc/cache"):
        folder = root / name
        probe = folder / f".writable-{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # By writing: permission bits say nothing of read-only mounts and full quotas.
            probe.touch()
            probe.unlink()
        except OSError as problem:
            raise PipelineRefused(
                f"{folder} cannot be written ({problem.strerror}): the pipeline keeps its results "
                "there; fix the permissions, or clone to a folder of your own"
            ) from None
