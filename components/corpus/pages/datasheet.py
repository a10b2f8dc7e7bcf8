"""The datasheet of a corpus: what is in it, what was left out and why, whose pictures they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sized
from typing import Any

import numpy as np
import pandas as pd

from components.corpus.manifest_columns import WORDS
from components.corpus.other_credits import CREDITS, OTHER_CREDITS
from components.corpus.pages.page_figures import bars, histogram, render
from components.corpus.selection.slices import DESCRIPTIONS

_SCORES = (
    ("entropy_bits", "entropy (bits)", None),
    ("flat_fraction", "flat fraction", None),
    ("glcm_score", "GLCM score", None),
    ("quality_score", "quality", "quality_scorer"),
    ("aesthetic", "aesthetic score", "aesthetic_scorer"),
    ("nsfw_score", "NSFW score", "nsfw_scorer"),
    ("drawing_score", "drawing score", "nsfw_scorer"),
)
_ATTRIBUTION = (*CREDITS, OTHER_CREDITS, "source")
_LICENCES = 20
_LOSSY_FILES = 50

COLUMNS = (
    *("kept", "reject_reason", "channel", "is_character", "megapixels", "aspect_ratio", "bucket"),
    *(name for name, _, _ in _SCORES),
    *dict.fromkeys(scorer for _, _, scorer in _SCORES if scorer is not None),
    *(WORDS, "caption_status"),
    *_ATTRIBUTION,
)
"""What a datasheet tells of; see `manifest_columns.read_columns`."""
PRESENCE = tuple(name for name in _ATTRIBUTION if name != "license")
"""Columns of which it tells only how many rows have a value."""


def _numbers(table: pd.DataFrame, column: str) -> np.ndarray:
    if column not in table:
        return np.array([])
    return table[column].to_numpy(dtype=float, na_value=np.nan)


def _counted(values: pd.Series, missing: str) -> list[tuple[str, int]]:
    """Values by falling count, then by name."""
    counts = Counter({missing: int(values.isna().sum())})
    counts.update({str(k): int(v) for k, v in values.value_counts().items()})
    found = [(name, number) for name, number in counts.items() if number]
    return sorted(found, key=lambda item: (-item[1], item[0]))


def _scorers(table: pd.DataFrame, column: str | None) -> str:
    if column is None or column not in table:
        return ""
    return ", ".join(sorted(str(name) for name in table[column].dropna().unique()))


def _apart(account: Mapping[str, Any]) -> str:
    """What is no record by its nature, such as "1 header, 2 blank"."""
    return ", ".join(f"{number} {name}" for name, number in account["apart"].items())


def _source(coverage: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The ledger of a source's files as the page shows it; None where there is none."""
    ledger = (coverage or {}).get("ledger", {})
    if coverage is None or not ledger.get("files"):
        return None
    totals = [
        {"unit": unit, **sums, "others": _apart(sums), "notes": sums["notes"]}
        for unit, sums in ledger["totals"].items()
    ]
    # Of a thousand lists a reader needs those that lost something, the worst first.
    lossy = [file for file in ledger["files"] if file["losses"]]
    lossy.sort(key=lambda file: (-file["losses"], file["file"]))
    return {
        "totals": totals,
        "files": [{**file, "others": _apart(file)} for file in lossy[:_LOSSY_FILES]],
        "more_files": max(0, len(lossy) - _LOSSY_FILES),
        "candidates": coverage["records"],
        "outcomes": [("in the manifest", coverage["kept"]), *coverage["losses"].items()],
    }


def datasheet_page(
    table: pd.DataFrame,
    slices: Mapping[str, Sized],
    coverage: Mapping[str, Any] | None = None,
    text_lengths: Mapping[str, Mapping[str, int]] | None = None,
) -> str:
    """A self-contained HTML page; equal tables give equal bytes.

    Args:
        table: `COLUMNS` of a manifest.
        slices: tables, or their rows, by name.
        coverage: coverage.json of ingest, whose ledger says what the source's files held.
        text_lengths: `text_lengths.json` of the stage `caption`: what text encoders cut.
    """
    kept = table[table["kept"].eq(True)]
    scores = [
        (title, _scorers(kept, scorer), values, histogram([("kept", values)], title))
        for column, title, scorer in _SCORES
        if np.isfinite(values := _numbers(kept, column)).any()
    ]
    rejected = table.loc[~table["kept"].eq(True), "reject_reason"]
    licences = _counted(kept["license"], "unknown")
    return render(
        "datasheet.html.j2",
        source=_source(coverage),
        candidates=len(table),
        kept=len(kept),
        people=int(kept["is_character"].eq(True).sum()),
        channels=_counted(kept["channel"], "unknown"),
        gigapixels=float(np.nansum(_numbers(kept, "megapixels"))) / 1000,
        losses=_counted(rejected, "unknown"),
        losses_figure=bars(_counted(rejected, "unknown"), "rejected images"),
        shapes=histogram(
            [("kept", _numbers(kept, "aspect_ratio"))], "width : height", logarithmic=True
        ),
        buckets=_counted(kept["bucket"], "none"),
        scores=[
            (title, scorer, np.nanquantile(values, [0.05, 0.5, 0.95]).tolist(), figure)
            for title, scorer, values, figure in scores
        ],
        captions=histogram([("kept", _numbers(kept, WORDS))], "words of the English caption"),
        text_lengths=sorted((text_lengths or {}).items()),
        statuses=_counted(kept["caption_status"], "none"),
        licences=licences[:_LICENCES],
        more_licences=max(0, len(licences) - _LICENCES),
        attribution=[
            (name, int(kept[name].notna().sum())) for name in _ATTRIBUTION if name in kept
        ],
        slices=[(name, DESCRIPTIONS[name], len(rows)) for name, rows in slices.items()],
    )
