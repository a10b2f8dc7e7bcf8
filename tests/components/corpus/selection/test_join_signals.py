from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from components.corpus.selection.join_signals import join_signals
from components.corpus.selection.rules import select
from components.settings.schema import load_settings

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize("has_errors", [True, False])
def test_a_picture_that_cannot_be_scored_is_rejected_for_that_and_costs_no_other(
    has_errors: bool,
) -> None:
    ids = ["a" * 64, "b" * 64, "c" * 64, "d" * 64]
    error = "1x1: too small to be scored"
    # In another order than the manifest, without the last, whose header is bad; "a" has its scores
    # and a complaint of something else.
    quality = pd.DataFrame(
        {
            "image_id": [ids[1], ids[0], ids[2]],
            "quality_score": [None, 0.5, 0.5],
            "quality_scorer": [None, "one", "one"],
            "aesthetic": [None, 0.5, 0.5],
            "aesthetic_scorer": [None, "one", "one"],
            "error": [error, "note", None] if has_errors else [None] * 3,
        }
    )
    manifest = pd.DataFrame(
        {
            "image_id": ids,
            "integrity": ["ok", "ok", "ok", "empty file"],
            "duplicate_of": [None] * 4,
            "width": [1, 1, 1, 1],
            "height": [1, 1, 1, 1],
        }
    )
    signals = pd.DataFrame(
        {"image_id": ids[:3], "integrity": ["ok"] * 3, "error": [None] * 3}
    ).assign(flat_fraction=0.0, entropy_bits=8.0)
    people = pd.DataFrame({"image_id": ids[:3], "channel": ["general"] * 3})
    settings = load_settings(ROOT / "params.yaml")
    table = join_signals(manifest, signals, quality, people, settings)
    refused = error if has_errors else "ok"
    assert table["integrity"].tolist() == ["ok", refused, "ok", "empty file"]
    rules = settings.select.model_copy(update={"min_pixels": 1, "max_nsfw": None})
    judged = select(table, rules.model_copy(update={"max_alpha_fraction": None}))
    reasons = judged["reject_reason"].fillna("kept").tolist()
    assert reasons == ["kept", "integrity" if has_errors else "kept", "kept", "integrity"]
