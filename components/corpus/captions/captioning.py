"""Captions of selected photographs: what came with them, what models write, and what they lack.

At a prompt, without the stage::

    settings = load_settings(Path("params.yaml"))
    selected = read_table(Path("data/select/manifest.parquet"))
    captioned = caption_photographs(selected, Path("data/signals/derivatives.parquet"), settings)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from components.corpus.captions.checks import PROVIDED
from components.corpus.captions.joining import join_captions
from components.corpus.captions.provided import provided_captions
from components.corpus.captions.statuses import STATUSES, remedies
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
    """What failed at the endpoint."""

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
    return "endpoint" in (settings.provider, settings.translate.provider)


def caption_photographs(
    selected: pd.DataFrame, derivatives: Path, settings: Settings, *, root: Path = Path()
) -> CaptionedPhotographs:
    """Join captions to a manifest; models are asked where the settings name an endpoint.

    Args:
        selected: of the stage `select`.
        derivatives: small copies that models look at; read only where a model is asked.
        settings: `caption`, and `ingest`, which says what came with the images.
        root: where relative paths start. Answers that were paid for stay below its `runs`, not in
            the state of one stage: after a change of settings they still answer what did not
            change.

    Raises:
        CaptioningRefused: captions file missing or wrong (with the line), endpoint of no use, or
            cost cap reached (with what is left).
    """
    caption = settings.caption
    try:
        captions = provided_captions(selected, settings.ingest, caption, root)
    except ValueError as problem:
        raise CaptioningRefused(str(problem)) from None
    spent_usd, problems = None, []
    if asks_models(caption):
        # The HTTP client is loaded only where there is an endpoint.
        from components.chat.client import EndpointUnusable
        from components.corpus.captions.models import write_captions
        from components.corpus.captions.writing import CaptioningStopped

        try:
            written = write_captions(
                selected,
                captions,
                derivatives,
                caption,
                derivative_px=settings.signals.derivative_px,
                cache=root / "runs" / "caption-requests.sqlite",
                root=root,
            )
        except (ValueError, EndpointUnusable, CaptioningStopped) as problem:
            raise CaptioningRefused(str(problem)) from None
        captions, spent_usd, problems = written.rows, written.spent_usd, written.problems
    was_kept = selected["kept"].eq(True)
    manifest = join_captions(selected, captions, caption)
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
        spent_usd=spent_usd,
        problems=problems,
    )
