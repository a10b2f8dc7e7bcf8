"""What a safetensors file says of itself: metadata in order, and ModelSpec's hash of the tensors.

The library writes metadata in an order that differs by process; here equal weights with equal
metadata are equal files. ModelSpec 1.0.1 (Stability AI) names the entries.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

SPEC = {"modelspec.sai_model_spec": "1.0.1"}
HASH = "modelspec.hash_sha256"
_CHUNK = 1 << 24
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


def described_header(header: bytes, about: Mapping[str, str], tensors_sha256: str) -> bytes:
    """The first bytes of a file, up to its tensors.

    Args:
        header: JSON of the file as the library wrote it.
        about: metadata in place of the file's own.
        tensors_sha256: of everything behind the header, as ModelSpec defines its hash.
    """
    values: dict[str, Any] = json.loads(header)
    values.pop("__metadata__", None)
    about = {**about, HASH: f"0x{tensors_sha256}"}
    described = {"__metadata__": dict(sorted(about.items())), **values}
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    # Padded with blanks, so that tensors stay aligned.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def describe_file(path: Path, about: Mapping[str, str]) -> None:
    """Put metadata into a file that the library has written; tensors are copied byte for byte.

    Args:
        path: replaced once the new file is whole.
        about: metadata; the file's own `format` stays.
    """
    aside = path.with_name(f".{path.name}.described")
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        start = file.tell()
        digest = hashlib.sha256()
        for part in _parts(file):
            digest.update(part)
        before = json.loads(header).get("__metadata__", {})
        kept = {key: value for key, value in before.items() if key == "format"}
        file.seek(start)
        with aside.open("wb") as target:
            target.write(described_header(header, {**kept, **about}, digest.hexdigest()))
            for part in _parts(file):
                target.write(part)
    os.replace(aside, path)


def system_error(problem: BaseException) -> OSError | None:
    """The system's error behind an exception; None: it is another one.

    safetensors writes files outside Python and leaves no more of it than a number in its words.
    """
    if isinstance(problem, OSError):
        return problem
    found = _SYSTEM_ERROR.search(str(problem))
    if found is None or type(problem).__name__ != "SafetensorError":
        return None
    return OSError(int(found[1]), os.strerror(int(found[1])))


def _parts(file: BinaryIO) -> Any:
    while part := file.read(_CHUNK):
        yield part


def metadata_of(path: Path) -> dict[str, str]:
    """Metadata of a file; empty where it has none."""
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    found: dict[str, str] = json.loads(header).get("__metadata__", {})
    return found
