"""Who looks for people and at what: the detectors that the settings name, run and joined.

At a prompt, without the stage::

    settings = load_settings(Path("params.yaml"))
    manifest = read_table(Path("data/ingest/manifest.parquet"))
    derivatives = Path("data/signals/derivatives.parquet")
    look_for_people(
        derivatives, manifest, Path("people.parquet"), settings, state_dir=Path("runs/mine")
    )
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pandas as pd
import pyarrow.parquet as pq

from components.corpus.derivatives import derivative_sizes, score_derivatives
from components.corpus.manifest import to_arrow
from components.corpus.people import evidence, faces, nsfw, person_detectors
from components.corpus.people.boxes_table import people_from_table
from components.corpus.people.evidence import PEOPLE_SCHEMA, LookPlan
from components.engine.map_items import EngineLimits, ItemsFailed
from components.files.parquet_files import write_parquet
from components.files.weight_folders import WeightsMissing, folder_digest, resolve_folder
from components.settings.corpus import PeopleSettings
from components.settings.schema import Settings

LOOKING_REFUSED = (ValueError, WeightsMissing, ItemsFailed)
"""What `look_for_people` raises for a reason that a person can remove; each is one line."""

# Loading a network counts against the first item's time, and CUDA reserves address space freely.
_NETWORK_TIMEOUT_S = 600.0
_NETWORK_MEMORY_MB = 2**24


def _digest(path: Path) -> str:
    return nsfw.file_sha256(path) if path.is_file() else folder_digest(path)


def look_plan(settings: PeopleSettings, *, device: str, root: Path = Path()) -> LookPlan:
    """What to look for, with weights that are found and identified once, before any worker starts.

    Raises:
        WeightsMissing: they are not there.
    """
    plan = LookPlan(
        detector="none" if settings.detector == "table" else settings.detector,
        nsfw=settings.nsfw.scorer,
        min_score=settings.min_score,
        device=device,
    )
    if plan.detector in ("owlv2", "rtdetr", "yoloe"):
        folder = root / settings.weights if settings.weights is not None else None
        weights = person_detectors.check_weights(plan.detector, folder)
        plan = replace(plan, weights=weights, weights_digest=_digest(weights))
    elif plan.detector == "nudenet":
        plan = replace(plan, weights_digest=nsfw.file_sha256(nsfw.nudenet_weights()))
    if plan.nsfw == "nudenet":
        plan = replace(plan, nsfw_digest=nsfw.file_sha256(nsfw.nudenet_weights()))
    elif plan.nsfw == "nsfwjs":
        # Read once here: what is missing or another network is one line, not one per photograph.
        from components.corpus.people.nsfwjs import FOLDER, load_network

        folder = root / (settings.nsfw.weights or FOLDER)
        load_network(folder)
        plan = replace(plan, nsfw_weights=folder, nsfw_digest=_digest(folder))
    elif plan.nsfw == "classifier" and settings.nsfw.weights is not None:
        folder = resolve_folder(
            root / settings.nsfw.weights,
            "NSFW classifier (people.nsfw.weights)",
            nsfw.CLASSIFIER_COMMAND,
        )
        plan = replace(plan, nsfw_weights=folder, nsfw_digest=_digest(folder))
    return plan


def _limits(settings: Settings, plan: LookPlan) -> EngineLimits:
    """Networks of torch get time to load, memory, and on a GPU one process."""
    if not plan.runs_networks:
        return EngineLimits.of(settings)
    return EngineLimits.for_networks(
        settings, timeout_s=_NETWORK_TIMEOUT_S, memory_mb=_NETWORK_MEMORY_MB
    )


def _network_modules(plan: LookPlan) -> tuple[ModuleType, ...]:
    """Further code that scores depend on; it imports torch, so only where it runs."""
    if plan.nsfw != "nsfwjs":
        return ()
    from components.corpus.people import layers_model, nsfwjs

    return layers_model, nsfwjs


def _look(
    derivatives: Path,
    settings: Settings,
    plan: LookPlan,
    state_dir: Path,
    only: Collection[str] | None = None,
) -> pd.DataFrame:
    path = state_dir / "looked_at.parquet"
    score_derivatives(
        partial(evidence.look_at, plan=plan),
        evidence,
        PEOPLE_SCHEMA,
        derivatives=derivatives,
        derivative_px=settings.signals.derivative_px,
        destination=path,
        state_dir=state_dir / "shards",
        limits=_limits(settings, plan),
        only=only,
        key=plan.key(),
        modules=(faces, nsfw, person_detectors, *_network_modules(plan)),
        outside=(WeightsMissing,),
    )
    return pq.read_table(path).to_pandas()


def _found(derivatives: Path, settings: Settings, root: Path, state_dir: Path) -> pd.DataFrame:
    """One row per derivative: of the table of boxes, or of what is looked for here."""
    people = settings.people
    plan = look_plan(people, device=settings.runtime.device, root=root)
    if people.boxes is None:
        return _look(derivatives, settings, plan, state_dir)
    sizes = derivative_sizes(derivatives)
    table = people_from_table(
        root / people.boxes, sizes, people.min_score, complete=people.detector == "table"
    )
    listed = set(table["image_id"])
    if plan.nsfw != "none":
        # Boxes made elsewhere say nothing of NSFW: that is still looked for here.
        unboxed = replace(plan, detector="none", weights=None, weights_digest=None)
        looked = _look(derivatives, settings, unboxed, state_dir / "listed", listed)
        table = table.merge(looked.drop(columns=table.columns[1:]), on="image_id", validate="1:1")
    rest = [name for name in sizes if name not in listed]
    if not rest:
        return table
    found = pd.concat([table, _look(derivatives, settings, plan, state_dir, rest)])
    # In the order of the derivatives: the same rows whichever of them the table lists.
    return found.set_index("image_id").loc[list(sizes)].reset_index()


def look_for_people(
    derivatives: Path,
    manifest: pd.DataFrame,
    destination: Path,
    settings: Settings,
    *,
    state_dir: Path,
    root: Path = Path(),
) -> None:
    """Write people, NSFW score and channel of every derivative.

    Args:
        derivatives: what the stage `signals` left.
        manifest: queries and sources of the images, which decide the channel.
        destination: Parquet file to write, columns of `PEOPLE_SCHEMA`.
        settings: `people` names detectors and channel; `signals` and `runtime` bound them.
        state_dir: survives kills; no image is looked at twice.
        root: where relative paths in the settings start.

    Raises:
        ValueError: external boxes that are missing or incomplete.
        WeightsMissing: weights that the settings name are not there.
        ItemsFailed: weights went away; what was looked at is kept.
    """
    found = _found(derivatives, settings, root, state_dir)
    people = settings.people
    result = evidence.with_channel(
        found, manifest, queries=people.human_queries, sources=people.human_sources
    )
    write_parquet(to_arrow(result, PEOPLE_SCHEMA), destination)
