"""Local weight folders: find them, name what is missing, and give them an identity.

Weights are never fetched: a missing folder is an error that says what was looked for, where, and
which command gets it. Only safetensors are accepted; pickled weights can run code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from components.settings.bad_input import BadInput

PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class WeightsMissing(BadInput):
    """Weights are not where they should be; one line that says how to get them.

    Attributes:
        name: what is missing, such as "FLUX.1-dev VAE".
        expected: the path that was looked for.
        command: shell command that puts it there.
        reason: why what is there does not do; empty where nothing is there.
    """

    def __init__(self, name: str, expected: str | Path, command: str, reason: str = "") -> None:
        self.name = name
        self.expected = str(expected)
        self.command = command
        self.reason = reason
        detail = f" ({reason})" if reason else ""
        super().__init__(f"{name} not found at {self.expected}{detail}; get it with: {command}")

    def __reduce__(self) -> tuple[type[WeightsMissing], tuple[str, str, str, str]]:
        # The default would call __init__ with the message alone when a worker process raises.
        return (type(self), (self.name, self.expected, self.command, self.reason))


class ComponentsMissing(WeightsMissing):
    """Several parts of a model are missing; one line for each.

    Attributes:
        missing: the parts.
    """

    def __init__(self, missing: Sequence[WeightsMissing]) -> None:
        self.missing = tuple(missing)
        super().__init__(missing[0].name, missing[0].expected, missing[0].command)
        self.args = ("\n".join(str(part) for part in missing),)

    def __reduce__(self) -> tuple[type[WeightsMissing], tuple[tuple[WeightsMissing, ...]]]:  # type: ignore[override]
        return (type(self), (self.missing,))


def resolve_folder(path: str | Path | None, what: str, command: str) -> Path:
    """A local diffusers or transformers folder with safetensors weights.

    Args:
        path: the folder; None means that the setting is empty.
        what: name of the weights for the message.
        command: how to get them, such as `install_hints.download_command` writes it.

    Returns:
        The folder as given (not resolved: reports stay free of machine paths).

    Raises:
        WeightsMissing: no such folder, no configuration in it, or no safetensors in it.
    """
    if path is None:
        raise WeightsMissing(what, "(no folder set)", command)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        reason = "it is a file, a folder is needed" if folder.exists() else ""
        raise WeightsMissing(what, folder, command, reason)
    if not any((folder / name).is_file() for name in ("config.json", "model_index.json")):
        raise WeightsMissing(what, folder, command, "the folder has no config.json")
    if not any(folder.rglob("*.safetensors")):
        pickled = [file for file in folder.rglob("*") if file.suffix in PICKLED_SUFFIXES]
        reason = "only pickled weights there, which are not loaded" if pickled else "no safetensors"
        raise WeightsMissing(what, folder, command, reason)
    return folder


def folder_digest(path: str | Path) -> str:
    """sha256 of a model folder: sorted relative names, sizes and bytes of its regular files.

    Hidden files (download caches) do not count, so a copied folder keeps its digest.

    Args:
        path: the folder.

    Returns:
        64 hexadecimal digits.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"path: {root} is not a folder")
    files = sorted(
        (file.relative_to(root).as_posix(), file) for file in root.rglob("*") if file.is_file()
    )
    digest = hashlib.sha256()
    for name, file in files:
        if any(part.startswith(".") for part in name.split("/")):
            continue
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def file_digest(path: str | Path, algorithm: str = "sha256") -> str:
    """Hash of a file's bytes, in hexadecimal; "md5" is what DVC writes."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def require_class(path: str | Path, subfolder: str | None, allowed: tuple[str, ...]) -> None:
    """Refuse a diffusers folder that holds another class than the caller can load.

    diffusers itself only warns and leaves the unmatched weights randomly initialised.

    Args:
        path: model folder.
        subfolder: folder inside it, or None.
        allowed: accepted values of `_class_name` in config.json.

    Raises:
        WeightsMissing: there is no config.json.
        ValueError: the configuration names another class, or is none.
    """
    folder = Path(path) / subfolder if subfolder else Path(path)
    config = folder / "config.json"
    if not config.is_file():
        raise WeightsMissing(
            allowed[0], folder, "set the folder of a saved model", "no config.json"
        )
    try:
        found = json.loads(config.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, LookupError, TypeError):
        raise ValueError(
            f"{config}: not a model's configuration (a JSON object with _class_name); download it "
            "again"
        ) from None
    if found not in allowed:
        raise ValueError(f"{folder}: holds a {found}, expected {' or '.join(allowed)}")


def weights_checksums(folder: Path) -> str:
    """A line `sha256  name` for each safetensors file, sorted by name, as sha256sum reads them."""
    # Only the weights: the card would otherwise contain a hash of itself.
    files = sorted(folder.glob("*.safetensors"))
    return "".join(f"{file_digest(file)}  {file.name}\n" for file in files)


def weights_identity(checksums: str) -> str:
    """Sha256 of `weights_checksums`: one number for all weight files."""
    return hashlib.sha256(checksums.encode()).hexdigest()


def class_name(folder: Path) -> str | None:
    """`_class_name` in a folder's config.json; None where it does not say, or is no folder."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) else None
