"""Every value of params.yaml: typed, bounded, documented."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from components.settings.schema import load_settings

__all__ = ["load_settings"]


def __getattr__(name: str) -> Any:
    """`load_settings`, whose schema is read only by who asks for it here."""
    if name != "load_settings":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from components.settings.schema import load_settings

    return load_settings
