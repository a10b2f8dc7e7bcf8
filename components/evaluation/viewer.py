"""Pictures inside one HTML file, and which of them the page's viewer lays over each other.

Every picture is base64 text in a data block (`<script type="image/webp">`) at the end of the page:
the browser reads past it, and decodes a picture when it is looked at. A picture of 4096 x 4096 is
shown from layers: a thumbnail of the whole stretched over its area, and native pixels on top where
the page has them.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup


@dataclass(frozen=True)
class Block:
    """One embedded picture."""

    id: str
    mime: str
    text: Markup
    """Base64."""


class EmbeddedPictures:
    """The pictures of a page, each once."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, Block] = {}
        self.page_bytes = 0
        """What they add to the page, in bytes of base64 and markup."""

    @staticmethod
    def cost(data: bytes) -> int:
        """What `add` would at most add to the page, in bytes."""
        return 4 * ((len(data) + 2) // 3) + 60

    def add(self, data: bytes, mime: str) -> str:
        """Embed `data`; the id names it in the page. Equal bytes are embedded once."""
        digest = hashlib.sha256(data).digest()
        if digest not in self._blocks:
            text = Markup(base64.b64encode(data).decode("ascii"))
            self._blocks[digest] = Block(f"p{len(self._blocks)}", mime, text)
            self.page_bytes += self.cost(data)
        return self._blocks[digest].id

    @property
    def blocks(self) -> list[Block]:
        """In order of addition."""
        return list(self._blocks.values())


@dataclass(frozen=True)
class Layer:
    """A part of a picture; lengths in native pixels of the whole."""

    y: int
    x: int
    height: int
    width: int
    picture: str = ""
    """Id of an embedded picture; empty where `path` is used."""
    path: str = ""
    """File beside the page, relative to it."""
    native: bool = True
    """False: a reduced copy, for the surroundings."""

    def as_json(self) -> dict[str, Any]:
        """Short keys: a page may have thousands of layers."""
        box = [self.x, self.y, self.width, self.height]
        source = {"p": self.picture} if self.picture else {"src": self.path}
        return {"box": box, "native": self.native, **source}


@dataclass(frozen=True)
class ViewedPicture:
    """One system's picture of an item."""

    height: int
    width: int
    layers: tuple[Layer, ...]
    """From the bottom to the top."""
    thumbnail: str = ""
    """Id of an embedded picture, for tables."""


@dataclass(frozen=True)
class ViewedItem:
    """What the systems made of one prompt or photograph."""

    id: str
    title: str
    pictures: Mapping[str, ViewedPicture]
    """By system."""


@dataclass(frozen=True)
class Viewer:
    """Everything that can be compared at native pixels."""

    systems: tuple[str, ...]
    items: Sequence[ViewedItem] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """Data of templates/viewer.js."""
        return {
            "systems": list(self.systems),
            "items": [
                {
                    "id": item.id,
                    "title": item.title,
                    "pictures": {
                        system: {
                            "size": [picture.width, picture.height],
                            "layers": [layer.as_json() for layer in picture.layers],
                        }
                        for system, picture in item.pictures.items()
                    },
                }
                for item in self.items
            ],
        }
