"""How captions and their statuses join the manifest."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from components.corpus.captions.checks import Judged
from components.settings.captions import CaptionSettings


def join_captions(
    table: pd.DataFrame, captions: Sequence[Judged], settings: CaptionSettings
) -> pd.DataFrame:
    """Add captions and their status; a kept row whose caption is not "ok" is rejected.

    Its reason is "caption"; for a length problem of the English caption reject_value is the number
    of words and reject_threshold the bound.

    Args:
        table: manifest rows with kept and the reject columns; unchanged.
        captions: one per row, in order.
        settings: bounds.
    """
    table = table.copy()
    table["caption_en"] = [caption.english for caption in captions]
    table["caption_zh"] = [caption.chinese for caption in captions]
    table["caption_model"] = [caption.caption_model for caption in captions]
    table["translation_model"] = [caption.translation_model for caption in captions]
    table["caption_status"] = pd.Series(
        [caption.status for caption in captions], index=table.index, dtype=object
    )
    words = pd.Series([caption.words for caption in captions], index=table.index, dtype=float)
    about_english = pd.Series([caption.failed_english for caption in captions], index=table.index)
    # A reject_value without a bound to hold it against would say nothing: only lengths have both.
    bounds = (
        table["caption_status"]
        .map({"too_short": float(settings.min_words), "too_long": float(settings.max_words)})
        .astype(float)
        .where(about_english)
    )
    rejected = table["kept"].eq(True) & (table["caption_status"] != "ok")
    table["reject_reason"] = table["reject_reason"].astype(object).mask(rejected, "caption")
    table["reject_value"] = table["reject_value"].mask(rejected, words.where(bounds.notna()))
    table["reject_threshold"] = table["reject_threshold"].mask(rejected, bounds)
    table["kept"] = table["kept"].eq(True) & ~rejected
    return table
