"""Every CPU signal of every candidate from one decode each, and small derivatives of them.

At a prompt, without the stage::

    settings = load_settings(Path("params.yaml"))
    manifest = read_table(Path("data/ingest/manifest.parquet"))
    measure_candidates(manifest, Path("mine"), settings, root=Path(), state_dir=Path("runs/mine"))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from components.engine.map_items import EngineLimits, code_digest, join_shards, map_items
from components.images import decoding
from components.images.original_lookup import OriginalLookup
from components.settings.schema import Settings
from components.signals import (
    candidate,
    entropy,
    flat_regions,
    fused_texture,
    glcm,
    jpeg_quality,
    pdq,
    shrinking,
)

SIGNALS = "signals.parquet"
DERIVATIVES = "derivatives.parquet"


def _refuse_unread(shards: Sequence[Path], names: dict[str, str]) -> None:
    """Fail when originals that ingest has read cannot be read now; their rows are forgotten.

    Such a row would say something of this moment's disk, while DVC would keep it for the manifest.
    """
    unread: list[str] = []
    for shard in shards:
        rows = pq.read_table(shard, columns=["image_id", "integrity"]).to_pandas()
        rows = rows[rows["integrity"].str.startswith(candidate.UNREAD, na=False)]
        unread += [f"{names[row.image_id]}: {row.integrity}" for row in rows.itertuples()]
        if len(rows):
            # The engine would take the shard for finished, and the moment's fault for the
            # picture's.
            shard.unlink()
    if unread:
        raise ValueError(f"{len(unread)} originals, the first is {unread[0]}")


def measure_candidates(
    manifest: pd.DataFrame, folder: Path, settings: Settings, *, root: Path, state_dir: Path
) -> None:
    """Write `folder`/signals.parquet and `folder`/derivatives.parquet.

    One row per distinct readable image (duplicates share it), in manifest order. Files whose header
    could not be read are not opened again.

    Args:
        manifest: of the stage `ingest`.
        folder: output.
        settings: `signals`, and `ingest.max_megapixels`.
        root: where the manifest's relative paths start.
        state_dir: survives kills.

    Raises:
        ValueError: an original is neither where the manifest says nor in the image store, or cannot
            be read now; one line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Copies share their signals by image_id: each content is decoded once.
    readable = manifest[(manifest["integrity"] == "ok") & manifest["duplicate_of"].isna()]
    # Before any worker starts: a corpus that has moved is one line, not a failure per photograph.
    originals = OriginalLookup(root).find_all(readable)
    # What a row depends on beside the picture: given to the function and part of the shards' names.
    measured: dict[str, Any] = {
        "patch_px": settings.signals.patch_px,
        "flat_variance": settings.signals.flat_variance,
        "derivative_px": settings.signals.derivative_px,
        "max_megapixels": settings.ingest.max_megapixels,
        "glcm": settings.signals.glcm,
    }
    code = code_digest(
        decoding,
        *decoding.DECIDING_MODULES,
        entropy,
        flat_regions,
        fused_texture,
        glcm,
        jpeg_quality,
        pdq,
        shrinking,
        candidate,
    )
    shards = map_items(
        candidate.measure_candidate,
        readable["image_id"].tolist(),
        [candidate.Candidate(path=original, **measured) for original in originals],
        stage="signals",
        # Only what changes numbers: after an edit elsewhere finished shards are still used.
        key={**measured, "kernels": candidate.kernels_digest(), "code": code},
        schema=candidate.CANDIDATE_SCHEMA,
        state_dir=state_dir / "shards",
        limits=EngineLimits.of(settings),
    )
    _refuse_unread(shards, {original.image_id: original.name for original in originals})
    join_shards(shards, candidate.SIGNALS_SCHEMA, folder / SIGNALS)
    join_shards(shards, candidate.DERIVATIVES_SCHEMA, folder / DERIVATIVES)
