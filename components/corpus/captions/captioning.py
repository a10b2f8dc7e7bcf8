"""Captions of selected photographs: what came with them, what models write, and what they lack.

At a prompt, without the stage::

    settings = load_settings(Path("params.yaml"))
    selected = read_table(Path("data/select/manifest.parquet"))
    captioned = caption_photographs(selected, Path("data/signals/derivatives.parquet"), settings)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from components.corpus.captions.caption_files import CaptionLoss
from components.corpus.captions.checks import (
    PROVIDED,
    WITHOUT_PICTURE,
    Captioned,
    Judged,
    Written,
    needs_english,
)
from components.corpus.captions.joining import join_captions
from components.corpus.captions.prompts import CAPTION_PROMPTS, prompt_of
from components.corpus.captions.provided import provided_captions
from components.corpus.captions.statuses import STATUSES, remedies
from components.engine.map_items import ItemsFailed
from components.engine.ordered_pool import WorkersDoNotStart
from components.files.weight_folders import WeightsMissing
from components.settings.captions import CaptionSettings
from components.settings.schema import Settings

_NAMED_IN_MESSAGES = 3


class CaptioningRefused(ValueError):
    """Captions that cannot be had: a wrong file, an unusable endpoint, a cost cap; one line."""


@dataclass(frozen=True)
class CaptionedPhotographs:
    """The manifest with captions, and how it went."""

    manifest: pd.DataFrame
    """A row that was kept and has no usable caption is rejected."""
    selected: int
    statuses: dict[str, int]
    """Of the selected rows, every name of `STATUSES`."""
    lost: list[str]
    """`file: status` of those without a usable caption."""
    spent_usd: float | None
    """None where no model was asked, or its prices are not known."""
    problems: list[str]
    """What failed at the models."""
    losses: list[CaptionLoss]
    """Lines and files that gave no caption, or one that had to be mended."""

    @property
    def kept(self) -> int:
        """Rows with a usable caption."""
        return int(self.manifest["kept"].sum())

    @property
    def provided(self) -> int:
        """Those of them whose caption came with the image."""
        origins = self.manifest.loc[self.manifest["kept"], "caption_model"].astype("string")
        return int(origins.str.startswith(PROVIDED).sum())

    @property
    def sharing_a_caption(self) -> int:
        """The same words for different pictures: a model that does not look, or a gallery."""
        captions = self.manifest.loc[self.manifest["kept"], "caption_en"]
        return int(captions.duplicated(keep=False).sum())

    @property
    def described_losses(self) -> str:
        """The first lost rows and the first error, for one line."""
        described = ", ".join(self.lost[:_NAMED_IN_MESSAGES])
        return f"{described}; first error: {self.problems[0]}" if self.problems else described

    @property
    def remedies(self) -> str:
        """What a person may change about captions that failed, the commonest status first."""
        return remedies(self.statuses)


def asks_models(settings: CaptionSettings) -> bool:
    """Whether a model writes or translates captions, and looks at the derivatives for it."""
    return settings.provider in ("endpoint", "local") or settings.translate.provider == "endpoint"


def caption_photographs(
    selected: pd.DataFrame, derivatives: Path, settings: Settings, *, root: Path = Path()
) -> CaptionedPhotographs:
    """Join captions to a manifest; models are asked where the settings name one.

    Args:
        selected: of the stage `select`.
        derivatives: small copies that models look at; read only where a model is asked.
        settings: `caption`, and `ingest`, which says what came with the images.
        root: where relative paths start. Answers that were paid for, in money or in hours of a GPU,
            stay below its `runs`, not in the state of one stage: after a change of settings they
            still answer what did not change.

    Raises:
        CaptioningRefused: captions file missing or of no use (with the first line), endpoint of no
            use, weights missing, or cost cap reached (with what is left).
    """
    caption = settings.caption
    try:
        provided = provided_captions(selected, settings.ingest, caption, root)
    except ValueError as problem:
        raise CaptioningRefused(str(problem)) from None
    found = Captioned(provided.rows, None, [])
    if caption.provider == "fixed":
        found = Captioned(_fixed(selected, provided.rows, caption), None, [])
    elif caption.provider == "local":
        found = _from_weights(selected, provided.rows, derivatives, settings, root)
    # After the local model: its captions are what the translator gets.
    if "endpoint" in (caption.provider, caption.translate.provider):
        asked = _from_endpoints(selected, found.rows, derivatives, settings, root)
        found = replace(asked, problems=[*found.problems, *asked.problems])
    was_kept = selected["kept"].eq(True)
    manifest = join_captions(selected, found.rows, caption)
    # Only rows that this stage rejects; those of `select` have their own reason.
    lost = manifest[was_kept & ~manifest["kept"]]
    counted = manifest.loc[was_kept, "caption_status"].value_counts()
    return CaptionedPhotographs(
        manifest=manifest,
        selected=int(was_kept.sum()),
        statuses={name: int(counted.get(name, 0)) for name in STATUSES},
        lost=[
            f"{Path(uri).name}: {status}"
            for uri, status in zip(lost["uri"], lost["caption_status"], strict=True)
        ],
        spent_usd=found.spent_usd,
        problems=found.problems,
        losses=provided.losses,
    )


def _gaps(selected: pd.DataFrame, rows: Sequence[Judged], settings: CaptionSettings) -> list[int]:
    """Places of kept rows without a caption of their own."""
    kept = selected["kept"].eq(True)
    return [
        place
        for place, (row, is_kept) in enumerate(zip(rows, kept, strict=True))
        if is_kept and needs_english(row, settings)
    ]


def _fixed(
    selected: pd.DataFrame, provided: Sequence[Judged], settings: CaptionSettings
) -> list[Judged]:
    """The one text where nothing came. It was chosen, so that no check has a say in it."""
    text = " ".join((settings.text or "").split())
    rows = list(provided)
    for place in _gaps(selected, rows, settings):
        rows[place] = Written(text, "ok").as_caption("fixed: caption.text")
    return rows


def _from_weights(
    selected: pd.DataFrame,
    provided: Sequence[Judged],
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
    rows = list(provided)
    gaps = _gaps(selected, rows, caption)
    ids = selected["image_id"].tolist()
    try:
        captions = caption_locally(
            {ids[place] for place in gaps},
            derivatives,
            settings,
            prompt_of(caption, CAPTION_PROMPTS, root),
            state_dir=root / "runs" / "caption-local",
            root=root,
        )
    except (ValueError, WeightsMissing, ItemsFailed, WorkersDoNotStart) as problem:
        raise CaptioningRefused(str(problem)) from None
    for place in gaps:
        written = captions.written.get(ids[place], WITHOUT_PICTURE)
        rows[place] = written.as_caption(captions.name)
    problems = [written.detail for written in captions.written.values() if written.detail]
    return Captioned(rows, None, problems)


def _from_endpoints(
    selected: pd.DataFrame,
    provided: Sequence[Judged],
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
            selected,
            provided,
            derivatives,
            settings.caption,
            derivative_px=settings.signals.derivative_px,
            cache=root / "runs" / "caption-requests.sqlite",
            root=root,
        )
    except (ValueError, EndpointUnusable, CaptioningStopped) as problem:
        raise CaptioningRefused(str(problem)) from None
