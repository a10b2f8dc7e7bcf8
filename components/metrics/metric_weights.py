"""Where the weights of learned metrics come from and where they are: file, size, licence, command.

They are looked for below `weights/`, then in the caches that other programs fill.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from components.files.install_hints import download_command
from components.files.weight_folders import PICKLED_SUFFIXES


@dataclass(frozen=True)
class Weights:
    """Where a learned metric's weights come from; sizes are approximate downloads."""

    path: str
    """File or folder below the repository's `weights/`."""
    size: str
    license: str
    command: str
    """What fetches them into `path` on a machine with network access."""
    repository: str | None = None
    """Hub repository; its snapshot in the hub's cache serves as well."""
    files: tuple[str, ...] = ()
    """Files that the folder must hold beside its weights."""
    also: tuple[Weights, ...] = ()
    """Further weights that the metric needs."""
    sha256: str | None = None
    """Of the file, or `folder_digest` of the folder, where it is known beforehand."""
    holds_network: bool = True
    """Whether a folder must hold a weights file; False for a tokenizer alone."""


def _hub_cache() -> Path:
    """Hugging Face's cache folder, by its own environment variables."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    home = os.environ.get("HF_HOME") or str(
        Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    )
    return Path(home).expanduser() / "hub"


def _torch_cache() -> Path:
    home = os.environ.get("TORCH_HOME") or str(
        Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "torch"
    )
    return Path(home).expanduser() / "hub"


def _snapshot(repository: str) -> Path | None:
    """The cached snapshot that the main branch last named."""
    folder = _hub_cache() / f"models--{repository.replace('/', '--')}"
    # The branch's name first: older snapshots stay in the cache beside the one it points at.
    reference = folder / "refs" / "main"
    if not reference.is_file():
        return None
    snapshot = folder / "snapshots" / reference.read_text(encoding="utf-8").strip()
    return snapshot if snapshot.is_dir() else None


def _places(weights: Weights, weights_dir: Path) -> Iterable[Path]:
    yield weights_dir / weights.path
    if weights.repository is not None:
        if (snapshot := _snapshot(weights.repository)) is not None:
            yield snapshot
    elif Path(weights.path).suffix:
        name = Path(weights.path).name
        yield from (_torch_cache() / "checkpoints" / name, _torch_cache() / "pyiqa" / name)


def _is_complete(place: Path, weights: Weights) -> bool:
    if weights.repository is None:
        return place.is_file() if Path(weights.path).suffix else place.is_dir()
    if not place.is_dir() or not all((place / name).is_file() for name in weights.files):
        return False
    if not weights.holds_network:
        return True
    # A download that was cut short leaves configuration files without any weights.
    suffixes = {".safetensors", *PICKLED_SUFFIXES}
    return any(file.suffix in suffixes for file in place.iterdir())


def place_of(weights: Weights, weights_dir: Path) -> Path | None:
    """The file or folder, complete by its names; None where there is none. Reads no weights.

    Args:
        weights: what is looked for, without its `also`.
        weights_dir: the repository's `weights/`.
    """
    places = _places(weights, weights_dir)
    return next((place for place in places if _is_complete(place, weights)), None)


def hub(
    folder: str,
    repository: str,
    size: str,
    license_name: str,
    *files: str,
    needs: tuple[str, ...] = ("config.json",),
    also: tuple[Weights, ...] = (),
) -> Weights:
    """Weights in a hub repository, fetched with the hub's own client."""
    command = download_command(repository, f"weights/{folder}", *files)
    return Weights(folder, size, license_name, command, repository, needs, also)
