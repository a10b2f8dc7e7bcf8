"""Captions of selected photographs: what came with them, what models write, and what they lack.

At a prompt, without the stage::

    settings = load_settings(Path("params.yaml"))
    selected = Path("data/select/manifest.parquet")
    derivatives = Path("data/signals/derivatives.parquet")
    print(caption_photographs(selected, derivatives, settings, Path("captioned.parquet")).statuses)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from components.corpus.captions.caption_files import CaptionLoss
from components.corpus.captions.checks import (
    PROVIDED,
    CaptionBatch,
    Captioned,
    Fill,
    Written,
    fill_english,
    filled,
    in_need,
    needs_english,
)
from components.corpus.captions.joining import join_captions
from components.corpus.captions.prompts import CAPTION_PROMPTS, prompt_of
from components.corpus.captions.provided import provided_captions
from components.corpus.captions.statuses import STATUSES, remedies
from components.corpus.manifest_columns import frame_of, manifest_batches, text_digests
from components.corpus.manifest_copies import rewrite_manifest
from components.engine.map_items import ItemsFailed
from components.engine.ordered_pool import WorkersDoNotStart
from components.files.weight_folders import WeightsMissing
from components.settings.captions import CaptionSettings
from components.settings.schema import Settings

_NAMED_IN_MESSAGES = 3
_DECISION = ("kept", "reject_reason", "reject_value", "reject_threshold")
WRITTEN = [
    *("caption_en", "caption_zh", "caption_status", "caption_model", "translation_model"),
    *_DECISION,
]
READ = ("image_id", "uri", "caption_en", "caption_zh", *_DECISION)
"""Columns of a manifest that this asks for, and those that it fills."""


class CaptioningRefused(ValueError):
    """Captions that cannot be had: a wrong file, an unusable endpoint, a cost cap; one line."""


@dataclass
class CaptionedPhotographs:
    """How it went, counted while the manifest is written."""

    selected: int = 0
    kept: int = 0
    """Rows with a usable caption; other rows that were selected are rejected."""
    provided: int = 0
    """Those of them whose caption came with the image."""
    sharing_a_caption: int = 0
    """The same words for different pictures: a model that does not look, or a gallery."""
    statuses: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STATUSES, 0))
    """Of the selected rows, every name of `STATUSES`."""
    first_lost: list[str] = field(default_factory=list)
    """`file: status` of the first without a usable caption."""
    spent_usd: float | None = None
    """None where no model was asked, or its prices are not known."""
    problems: list[str] = field(default_factory=list)
    """What failed at the models."""
    losses: list[CaptionLoss] = field(default_factory=list)
    """Lines and files that gave no caption, or one that had to be mended."""

    @property
    def lost(self) -> int:
        """Rows that were selected and have no usable caption."""
        return self.selected - self.kept

    @property
    def described_losses(self) -> str:
        """The first lost rows and the first error, for one line."""
        described = ", ".join(self.first_lost)
        return f"{described}; first error: {self.problems[0]}" if self.problems else described

    @property
    def remedies(self) -> str:
        """What a person may change about captions that failed, the commonest status first."""
        return remedies(self.statuses)

    def count(self, was_kept: pd.Series, captioned: pd.DataFrame) -> None:
        """Add some rows, before and after."""
        # Only rows that this stage rejects; those of `select` have their own reason.
        selected = captioned[was_kept]
        kept = selected[selected["kept"]]
        self.selected += len(selected)
        self.kept += len(kept)
        origins = kept["caption_model"].astype("string")
        self.provided += int(origins.str.startswith(PROVIDED).sum())
        for status, number in selected["caption_status"].value_counts().items():
            self.statuses[str(status)] += int(number)
        lost = selected[~selected["kept"]].head(_NAMED_IN_MESSAGES - len(self.first_lost))
        for uri, status in zip(lost["uri"], lost["caption_status"], strict=True):
            self.first_lost.append(f"{Path(uri).name}: {status}")


def asks_models(settings: CaptionSettings) -> bool:
    """Whether a model writes or translates captions, and looks at the derivatives for it."""
    return settings.provider in ("endpoint", "local") or settings.translate.provider == "endpoint"


def caption_photographs(
    selected: Path, derivatives: Path, settings: Settings, output: Path, *, root: Path = Path()
) -> CaptionedPhotographs:
    """Join captions to a manifest; models are asked where the settings name one.

    Rows are in memory a few thousand at a time: they are read once for each model that is asked,
    and once more to be written.

    Args:
        selected: manifest of the stage `select`.
        derivatives: small copies that models look at; read only where a model is asked.
        settings: `caption`, and `ingest`, which says what came with the images.
        output: the manifest with captions; a row that was kept and has no usable caption is
            rejected.
        root: where relative paths start. Answers that were paid for, in money or in hours of a GPU,
            stay below its `runs`, not in the state of one stage: after a change of settings they
            still answer what did not change.

    Raises:
        CaptioningRefused: captions file missing or of no use (with the first line), endpoint of no
            use, weights missing, or cost cap reached (with what is left).
    """
    caption = settings.caption
    try:
        provided = provided_captions(
            _uris(selected), _copies(selected), settings.ingest, caption, root
        )
    except ValueError as problem:
        raise CaptioningRefused(str(problem)) from None
    captions = Captioned([], None, [])

    def batch_of(rows: pd.DataFrame) -> CaptionBatch:
        kept = rows["kept"].eq(True).tolist()
        batch = CaptionBatch(rows["image_id"].tolist(), kept, provided.of(rows))
        return filled(batch, captions.fills)

    def batches() -> Iterator[CaptionBatch]:
        for rows in manifest_batches(selected, READ, code_text=False):
            yield batch_of(frame_of(rows, READ))

    if caption.provider == "fixed":
        captions.fills.append(_fixed(caption))
    elif caption.provider == "local":
        captions = _from_weights(batches, derivatives, settings, root)
    # After the local model: its captions are what the translator gets.
    if "endpoint" in (caption.provider, caption.translate.provider):
        asked = _from_endpoints(batches, derivatives, settings, root)
        captions = Captioned(
            [*captions.fills, *asked.fills], asked.spent_usd, [*captions.problems, *asked.problems]
        )
    found = CaptionedPhotographs(spent_usd=captions.spent_usd, problems=captions.problems)
    digests: list[np.ndarray] = []

    def captioned(rows: pd.DataFrame) -> pd.DataFrame:
        changed = join_captions(rows, batch_of(rows).rows, caption)
        found.count(rows["kept"].eq(True), changed)
        digests.append(text_digests(pa.array(changed.loc[changed["kept"], "caption_en"])))
        return changed[WRITTEN]

    rewrite_manifest(selected, READ, captioned, output)
    _, times = np.unique(np.concatenate([np.empty(0, np.uint64), *digests]), return_counts=True)
    found.sharing_a_caption = int(times[times > 1].sum())
    # After the last reading of what came with the images.
    found.losses = provided.losses
    return found


def _uris(manifest: Path) -> Iterator[str]:
    for batch in manifest_batches(manifest, ["uri"]):
        yield from batch["uri"].to_pylist()


def _copies(manifest: Path) -> dict[str, list[str]]:
    """`uri` of byte-identical copies by image_id."""
    copies: dict[str, list[str]] = {}
    for batch in manifest_batches(manifest, ["image_id", "uri", "duplicate_of"]):
        # Of a near duplicate it is another photograph's.
        for row in batch.filter(pc.equal(batch["image_id"], batch["duplicate_of"])).to_pylist():
            copies.setdefault(row["image_id"], []).append(row["uri"])
    return copies


def _fixed(settings: CaptionSettings) -> Fill:
    """The one text where nothing came. It was chosen, so that no check has a say in it."""
    fixed = Written(" ".join((settings.text or "").split()), "ok")
    return fill_english(fixed, "fixed: caption.text", settings)


def _from_weights(
    batches: Callable[[], Iterable[CaptionBatch]],
    derivatives: Path,
    settings: Settings,
    root: Path,
) -> Captioned:
    """What the model of a local folder writes where nothing came.

    Raises:
        CaptioningRefused: no such model, or an unusable prompt.
    """
    # transformers is loaded only where there is such a model.
    from components.corpus.captions.local import caption_locally

    caption = settings.caption
    try:
        captions = caption_locally(
            {image_id for image_id, _ in in_need(batches(), needs_english, caption)},
            derivatives,
            settings,
            prompt_of(caption, CAPTION_PROMPTS, root),
            state_dir=root / "runs" / "caption-local",
            root=root,
        )
    except (ValueError, WeightsMissing, ItemsFailed, WorkersDoNotStart) as problem:
        raise CaptioningRefused(str(problem)) from None
    problems = [written.detail for written in captions.written.values() if written.detail]
    return Captioned([fill_english(captions.written, captions.name, caption)], None, problems)


def _from_endpoints(
    batches: Callable[[], Iterable[CaptionBatch]],
    derivatives: Path,
    settings: Settings,
    root: Path,
) -> Captioned:
    """What models behind servers write and translate.

    Raises:
        CaptioningRefused: endpoint of no use, or cost cap reached.
    """
    # The HTTP client is loaded only where there is an endpoint.
    from components.chat.client import EndpointUnusable
    from components.corpus.captions.models import write_captions
    from components.corpus.captions.writing import CaptioningStopped

    try:
        return write_captions(
            batches,
            derivatives,
            settings.caption,
            derivative_px=settings.signals.derivative_px,
            cache=root / "runs" / "caption-requests.sqlite",
            root=root,
        )
    except (ValueError, EndpointUnusable, CaptioningStopped) as problem:
        raise CaptioningRefused(str(problem)) from None
