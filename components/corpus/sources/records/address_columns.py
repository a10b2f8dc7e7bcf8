"""Which column of a list holds the addresses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from components.corpus.sources.record_fields import ALIASES, normalise_key

ADDRESS = "image_url"
"""The field of a record that is the address of its photograph."""
_LIKE_AN_ADDRESS = re.compile(r"\s*https?://[^\s/]", re.IGNORECASE)


def is_address(cell: object) -> bool:
    """Whether a cell begins like a web address."""
    return isinstance(cell, str) and _LIKE_AN_ADDRESS.match(cell) is not None


def address_column(names: Sequence[str], url_column: str | None) -> int | None:
    """Where addresses stand among columns: the best spelling that is there; None if none is.

    Args:
        names: as the file spells them.
        url_column: the only spelling that counts; None: all that `ALIASES` knows.
    """
    wanted = ALIASES[ADDRESS] if url_column is None else (normalise_key(url_column),)
    # Backwards, so that of two columns with one meaning the first stays, as in `read_fields`.
    places = {normalise_key(name): at for at, name in reversed(list(enumerate(names)))}
    return next((places[name] for name in wanted if name in places), None)


def with_address(values: dict[str, Any], url_column: str | None) -> dict[str, Any]:
    """The record with its address under `image_url`, where `url_column` names another field.

    Nothing is lost: what stood under `image_url` is then `image_url.2`.
    """
    if url_column is None:
        return values
    at = address_column(list(values), url_column)
    if at is None:
        return values
    key = list(values)[at]
    if normalise_key(key) == ADDRESS:
        return values
    other = {
        f"{name}.2" if normalise_key(name) == ADDRESS else name: value
        for name, value in values.items()
        if name != key
    }
    return {ADDRESS: values[key], **other}


def described(names: Sequence[str] | Mapping[str, Any]) -> str:
    """Names for a message, bounded."""
    shown = [name if len(name) <= 60 else f"{name[:57]}..." for name in list(names)[:12]]
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(repr(name)[1:-1] for name in shown) + more
