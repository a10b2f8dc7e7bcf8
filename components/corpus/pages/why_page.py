"""A photograph beside the one that was kept in its place, as an HTML page or a PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from components.corpus.derivatives import jpegs_of
from components.corpus.pages.page_figures import render, write_page
from components.corpus.selection.why import Why
from components.files.whole_files import write_bytes

_GAP_PX = 8
_TEXT_PX = 18
SUFFIXES = (".html", ".png")


def write_why(why: Why, derivatives: Path, destination: Path) -> None:
    """Write verdict and pictures.

    Args:
        why: verdict.
        derivatives: output of the stage `signals`; a picture that is not in it is left out.
        destination: ends in one of `SUFFIXES`.

    Raises:
        ValueError: another ending, or no picture to show in a PNG; one line.
    """
    if destination.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{destination}: choose a file name that ends in .html or .png")
    shown = [(why.image_id, why.uri)] + ([why.keeper] if why.keeper is not None else [])
    wanted = [image_id for image_id, _ in shown]
    jpegs = jpegs_of(derivatives, wanted) if derivatives.is_file() else {}
    pictures = [(uri, jpegs[image_id]) for image_id, uri in shown if image_id in jpegs]
    if destination.suffix.lower() == ".html":
        embedded = [(uri, base64.b64encode(jpeg).decode("ascii")) for uri, jpeg in pictures]
        write_page(
            render("why.html.j2", why=why, lines=why.lines(), pictures=embedded),
            destination,
            follow=True,
        )
        return
    if not pictures:
        raise ValueError(f"{why.uri}: no derivative to show (was it decoded?); write an .html page")
    write_bytes(destination, _side_by_side(pictures), follow=True)


def _side_by_side(pictures: Sequence[tuple[str, bytes]]) -> bytes:
    """PNG of (name, JPEG) pairs in a row on white, names above."""
    from PIL import Image, ImageDraw

    images: list[Image.Image] = []
    for _, jpeg in pictures:
        with Image.open(io.BytesIO(jpeg)) as opened:
            images.append(opened.convert("RGB"))
    width = sum(image.width for image in images) + _GAP_PX * (len(images) - 1)
    page = Image.new("RGB", (width, max(image.height for image in images) + _TEXT_PX), "white")
    draw, left = ImageDraw.Draw(page), 0
    for (name, _), image in zip(pictures, images, strict=True):
        # PIL's built-in face knows Latin-1 alone in some builds: what it lacks must not end this.
        draw.text((left, 2), name.encode("ascii", "replace").decode("ascii"), fill="black")
        page.paste(image, (left, _TEXT_PX))
        left += image.width + _GAP_PX
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    return buffer.getvalue()
