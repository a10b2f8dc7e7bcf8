"""The viewer of an evaluation's pictures, within a budget of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from components.evaluation.pages.report_pictures import (
    CROP_MIME,
    TILE_MIME,
    Prepared,
    Source,
    native_tiles,
    prepare_item,
    read_source,
)
from components.evaluation.viewer import (
    EmbeddedPictures,
    Layer,
    ViewedItem,
    ViewedPicture,
    Viewer,
)
from components.files.whole_files import write_bytes
from components.images.decoding import MAX_MEGAPIXELS

WHOLE_LIMIT = 12
"""Worst cases whose whole native pixels are embedded, as far as the budget goes."""


@dataclass(frozen=True)
class ItemSources:
    """Files of one item."""

    id: str
    title: str
    sources: dict[str, Source]
    """By system."""


@dataclass(frozen=True)
class PictureOptions:
    """How much a page may hold."""

    budget_bytes: int
    """Of embedded pictures, as they stand in the page."""
    tiles: Path | None = None
    """Folder beside the page that receives the native pixels of every picture; None: none do."""
    workers: int = 1
    """Threads; no influence on the page."""
    max_megapixels: float = MAX_MEGAPIXELS


@dataclass
class Held:
    """How many pictures the page shows, and how."""

    thumbnails: int = 0
    crops: int = 0
    whole: int = 0
    """Native pixels everywhere."""


class PicturesDoNotFit(ValueError):
    """Not even the thumbnails fit into the budget."""


def _whole_layers(
    source: Source, options: PictureOptions, embedded: EmbeddedPictures
) -> list[Layer]:
    """Native tiles of one picture, in a folder or in the page; none where they do not fit."""
    pixels = read_source(source, max_megapixels=options.max_megapixels)
    if pixels is None:
        return []
    if options.tiles is None:
        tiles = list(native_tiles(pixels))
        if embedded.page_bytes + sum(embedded.cost(d) for _, d in tiles) > options.budget_bytes:
            return []
        return [Layer(*box, picture=embedded.add(data, TILE_MIME)) for box, data in tiles]
    folder = options.tiles / source.sha256[:16]
    folder.mkdir(parents=True, exist_ok=True)
    layers = []
    for box, data in native_tiles(pixels):
        target = folder / f"{box[0]}_{box[1]}.jpg"
        write_bytes(target, data)
        layers.append(Layer(*box, path=f"{options.tiles.name}/{folder.name}/{target.name}"))
    return layers


def _needs_tiles(prepared: Prepared) -> bool:
    return prepared.crop_box[2:] != (prepared.height, prepared.width)


def build_viewer(
    items: Sequence[ItemSources],
    systems: Sequence[str],
    worst: Sequence[tuple[str, tuple[str, ...]]],
    options: PictureOptions,
) -> tuple[Viewer, EmbeddedPictures, Held]:
    """Embed thumbnails of all pictures, then native crops, then whole worst cases.

    Args:
        items: in the order of the page.
        systems: names, in the order of the viewer's lists.
        worst: (item, systems) with the worst first: their crops come first, and their whole native
            pixels follow as long as the budget lasts.
        options: the budget.

    Raises:
        PictureChanged: a file is gone or was changed since it was measured.
        PicturesDoNotFit: the thumbnails alone exceed the budget.
    """
    embedded, held = EmbeddedPictures(), Held()
    with ThreadPoolExecutor(options.workers) as pool:
        prepared = dict(
            zip(
                (item.id for item in items),
                pool.map(
                    lambda item: prepare_item(item.sources, max_megapixels=options.max_megapixels),
                    items,
                ),
                strict=True,
            )
        )
    layers: dict[tuple[str, str], list[Layer]] = {}
    thumbnails: dict[tuple[str, str], str] = {}
    for item, found in prepared.items():
        for system, picture in found.items():
            thumbnail = thumbnails[item, system] = embedded.add(picture.thumbnail, "image/jpeg")
            whole = Layer(0, 0, picture.height, picture.width, thumbnail, native=False)
            layers[item, system] = [whole]
            held.thumbnails += 1
    if embedded.page_bytes > options.budget_bytes:
        raise PicturesDoNotFit(
            f"{held.thumbnails} thumbnails take {embedded.page_bytes / 1e6:.0f} MB, the budget is "
            f"{options.budget_bytes / 1e6:.0f} MB; raise --budget-mb, or report fewer systems"
        )
    first = list(dict.fromkeys([item for item, _ in worst] + [item.id for item in items]))
    for item in first:
        for system, picture in prepared[item].items():
            if embedded.page_bytes + embedded.cost(picture.crop) <= options.budget_bytes:
                crop = embedded.add(picture.crop, CROP_MIME)
                layers[item, system].append(Layer(*picture.crop_box, picture=crop))
                held.crops += 1
                held.whole += not _needs_tiles(picture)
    done: set[tuple[str, str]] = set()
    everything = [(item.id, tuple(prepared[item.id])) for item in items]
    sources = {item.id: item.sources for item in items}
    for item, names in worst[:WHOLE_LIMIT] if options.tiles is None else everything:
        for system in names:
            known = prepared[item].get(system)
            if known is None or not _needs_tiles(known) or (item, system) in done:
                continue
            tiles = _whole_layers(sources[item][system], options, embedded)
            if tiles:
                layers[item, system] = layers[item, system][:1] + tiles
                held.whole += 1
                done.add((item, system))
    viewed = [
        ViewedItem(
            item.id,
            item.title,
            {
                system: ViewedPicture(
                    picture.height,
                    picture.width,
                    tuple(layers[item.id, system]),
                    thumbnails[item.id, system],
                )
                for system, picture in prepared[item.id].items()
            },
        )
        for item in items
        if prepared[item.id]
    ]
    return Viewer(tuple(systems), viewed), embedded, held
