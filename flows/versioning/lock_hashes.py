"""DVC hashes that an entry of dvc.lock names, and where the cache keeps what has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def out_hashes(entry: Mapping[str, Any]) -> dict[str, str]:
    """Hash by path of what a stage made."""
    return _hashes(entry, "outs")


def dep_hashes(entry: Mapping[str, Any]) -> dict[str, str]:
    """Hash by path of what a stage read."""
    return _hashes(entry, "deps")


def _hashes(entry: Mapping[str, Any], kind: str) -> dict[str, str]:
    return {one["path"]: str(one.get("md5", "")) for one in entry.get(kind, [])}


def cached_file(cache: Path, md5: str) -> Path:
    """Where DVC's cache folder keeps a hash, whether it is there or not."""
    return cache / md5[:2] / md5[2:]
