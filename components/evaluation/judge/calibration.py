"""Planted pairs: who does not prefer a picture to its blurred twin cannot judge the rest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from components.evaluation.judge.judge import Judgement, Pair
from components.files.whole_files import whole_file
from components.images.decoding import ImageUndecodable, read_rgb

PLANTED = 3
QUESTIONS = ("aesthetics", "detail")
"""What a blur decides; the text of a prompt is met by both twins."""
_RADIUS_SHARE = 1 / 128
_LEAST_RADIUS = 2.0
_LEAST_CHANGE = 1.0
"""Mean absolute change in levels of 255: a flat picture has no blurred twin."""


def blurred(picture: Image.Image) -> Image.Image:
    """The picture under a Gaussian blur of 1/128 of its short edge: plain in the whole, too."""
    radius = max(_LEAST_RADIUS, min(picture.size) * _RADIUS_SHARE)
    return picture.filter(ImageFilter.GaussianBlur(radius))


def planted_pairs(pairs: Sequence[Pair], folder: Path, count: int = PLANTED) -> list[Pair]:
    """Pictures of system A beside their blurred twins, which are written to `folder`.

    Args:
        pairs: of the run; the first that have detail to lose are taken, one per prompt.
        folder: made when missing.
        count: at most.
    """
    folder.mkdir(parents=True, exist_ok=True)
    planted: list[Pair] = []
    prompts: set[str] = set()
    for pair in pairs:
        if len(planted) == count:
            break
        if pair.prompt in prompts:
            continue
        try:
            original = Image.fromarray(read_rgb(pair.a).pixels)
        except ImageUndecodable:
            # The run itself says so.
            continue
        twin = blurred(original)
        change = np.abs(np.asarray(twin, np.int16) - np.asarray(original, np.int16)).mean()
        if change < _LEAST_CHANGE:
            continue
        prompts.add(pair.prompt)
        path = folder / f"{pair.name}_blurred.png"
        with whole_file(path) as temporary:
            twin.save(temporary, format="PNG")
        planted.append(Pair(f"planted {pair.name}", pair.prompt, pair.a, path))
    return planted


def failure(judgements: Sequence[Judgement]) -> str:
    """Why the judge is not to be trusted, in one line; empty where every twin lost."""
    wrong = [one for one in judgements if one.outcome != "a"]
    if not wrong:
        return ""
    said = {"b": "the twin won", "tie": "a tie, or by the place", "unanswered": "no answer"}
    kinds = ", ".join(sorted({said[one.outcome] for one in wrong}))
    return (
        f"the judge failed {len(wrong)} of {len(judgements)} planted pairs, a picture and its "
        f"blurred twin, which must lose in both orders ({kinds}; first: {wrong[0].question}, "
        f"{wrong[0].pair.name}"
        f"{': ' + wrong[0].problem if wrong[0].problem else ''})"
    )
