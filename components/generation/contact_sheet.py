"""Many pictures on one small sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

_SHEET_GAP_PX = 12


def contact_sheet(
    images: Sequence[Image.Image], *, columns: int, cell_px: int, max_px: int = 1024
) -> Image.Image:
    """Pictures on a grid, each fitted into a square cell and centred.

    Args:
        images: row by row.
        columns: pictures per row.
        cell_px: edge of a cell before the sheet is fitted into `max_px`.
        max_px: long edge of the sheet.
    """
    if not images or columns < 1:
        raise ValueError("a contact sheet needs at least one picture and one column")
    rows = math.ceil(len(images) / columns)
    step = cell_px + _SHEET_GAP_PX
    sheet = Image.new("RGB", (columns * step + _SHEET_GAP_PX, rows * step + _SHEET_GAP_PX), "white")
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(images):
        row, column = divmod(index, columns)
        left, top = _SHEET_GAP_PX + column * step, _SHEET_GAP_PX + row * step
        draw.rectangle((left, top, left + cell_px - 1, top + cell_px - 1), fill=(238, 238, 238))
        fitted = picture.convert("RGB")
        fitted.thumbnail((cell_px, cell_px), Image.Resampling.LANCZOS)
        offset = ((cell_px - fitted.width) // 2, (cell_px - fitted.height) // 2)
        sheet.paste(fitted, (left + offset[0], top + offset[1]))
    if max(sheet.size) > max_px:
        sheet.thumbnail((max_px, max_px), Image.Resampling.LANCZOS)
    return sheet
