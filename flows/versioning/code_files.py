"""The files of the stage `code`: what they hold, and which stages' code has changed since.

`data/code/<stage>.json` holds the fingerprint of a stage module and, without their names, the
hashes of the modules that it reaches: a renamed module must leave the file as it is, and a person
who asks what changed still gets the names of modules that are not among those hashes.

DVC sees only that some file of the code changed, which a comment does too. Whether a stage is stale
for its code is therefore asked here, by meaning, of the code as it stands.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from components.files.code_identity import PACKAGES, STAGES, CodeIdentity
from components.files.whole_files import write_text
from flows.versioning.lock_hashes import cached_file, dep_hashes

CODE = "code"
"""The stage's name."""
FOLDER = "data/code"
_CACHE = Path("runs", "code.json")
# Part of the digest: a change of how code is read makes every kept answer void.
_FORMAT = 1
RUNNING_CODE = Path(__file__).resolve().parents[2]
"""The clone whose code this process runs."""


def code_path(stage: str) -> str:
    """The file that a stage depends on, relative to the repository root."""
    return f"{FOLDER}/{stage}.json"


def code_texts(root: Path, sources_root: Path | None = None) -> dict[str, str]:
    """What the stage `code` writes now, by stage.

    Parsing everything takes seconds, so the answer is kept below `runs/` until a file changes.

    Args:
        root: the clone that asks, where the answer is kept.
        sources_root: the clone whose code is read; None: the same.

    Raises:
        SyntaxError: a module cannot be parsed.
    """
    sources_root = sources_root or root
    sources = _sources_digest(sources_root)
    try:
        kept = json.loads((root / _CACHE).read_text(encoding="utf-8"))
        # By the bytes of all files, which takes milliseconds: times would lie after a checkout.
        if kept["sources"] == sources:
            return dict(kept["texts"])
    except (OSError, ValueError, KeyError, TypeError):
        # A cache that is missing or damaged is made again.
        pass
    identity = CodeIdentity(sources_root)
    names = [name for name in identity.stages() if name != CODE]
    texts = {name: _text(identity, f"{STAGES}.{name}") for name in names}
    (root / _CACHE).parent.mkdir(parents=True, exist_ok=True)
    write_text(root / _CACHE, json.dumps({"sources": sources, "texts": texts}), contended=True)
    return texts


def write_code_files(root: Path) -> list[str]:
    """Bring `data/code` in line with the code as it stands; the stages, in alphabetical order.

    Files that are right already are left alone, and so keep their times.
    """
    texts = code_texts(root)
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    # A stage that is gone leaves no file behind: DVC takes the folder's content for the stage's
    # output.
    for path in folder.iterdir():
        if path.stem not in texts or path.suffix != ".json":
            path.unlink()
    for name, text in texts.items():
        if _read(root / code_path(name)) != text:
            write_text(root / code_path(name), text)
    return sorted(texts)


def reaches(root: Path, stage: str, module: str) -> bool:
    """Whether a stage's code refers to a module, directly or through others."""
    identity = CodeIdentity(root)
    own = f"{STAGES}.{stage}"
    return own in identity.modules and module in identity.closure(own)


def _text(identity: CodeIdentity, module: str) -> str:
    # Sorted by hash, without names: a renamed or moved module leaves the file's bytes as they are.
    own = sorted(set(identity.own_hashes(module).values()))
    value = {"fingerprint": identity.fingerprint(module), "modules": own}
    return json.dumps(value, indent=1) + "\n"


def _sources_digest(root: Path) -> str:
    """sha256 over names and bytes of all code and templates, and over this reading of them."""
    digest = hashlib.sha256(f"format {_FORMAT}\n".encode())
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(root)}\0".encode("utf-8", "surrogatepass"))
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


class CodeChanges:
    """How the code as it stands differs from what results were made with."""

    def __init__(self, root: Path) -> None:
        """Read nothing yet."""
        self.root = root

    @cached_property
    def texts(self) -> dict[str, str]:
        """See `code_texts`."""
        return code_texts(self.root)

    @cached_property
    def identity(self) -> CodeIdentity:
        """Of the code as it stands."""
        return CodeIdentity(self.root)

    def written(self) -> bool:
        """Whether `data/code` holds what the stage `code` would write."""
        return all(_read(self.root / code_path(name)) == text for name, text in self.texts.items())

    def since(self, stage: str, entry: Mapping[str, Any], cache: Path | None = None) -> str:
        """What of a stage's code has changed since its entry of dvc.lock; empty for nothing.

        Args:
            stage: its name.
            entry: what dvc.lock says of it.
            cache: DVC's cache folder, where the file of that time may lie.
        """
        path = code_path(stage)
        before = dep_hashes(entry).get(path)
        text = self.texts.get(stage)
        if before is None or text is None or hashlib.md5(text.encode()).hexdigest() == before:
            return ""
        return self._difference(stage, self._text_with(path, before, cache))

    def _text_with(self, path: str, md5: str, cache: Path | None) -> str | None:
        """The file with this hash, from the workspace or the cache."""
        # The workspace first: with a fresh clone, or a cache that was cleaned, it is the only
        # place.
        places = [self.root / path]
        if cache is not None:
            places.append(cached_file(cache, md5))
        for place in places:
            text = _read(place)
            if text is not None and hashlib.md5(text.encode()).hexdigest() == md5:
                return text
        return None

    def _difference(self, stage: str, before: str | None) -> str:
        """One clause: the modules that are not what they were."""
        if before is None:
            return "its code"
        known = set(json.loads(before)["modules"])
        own = self.identity.own_hashes(f"{STAGES}.{stage}")
        changed = [name for name, digest in own.items() if digest not in known]
        if not changed:
            return "its code: a module less, or other imports between them"
        return f"its code: {', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}"

    def other_than_written(self, stage: str) -> str:
        """How the code that runs differs from a stage's file; empty for not at all.

        The code that runs is what this process imports, which need not be the clone's.

        Raises:
            FileNotFoundError: the file is not there.
        """
        before = (self.root / code_path(stage)).read_text(encoding="utf-8")
        if before == code_texts(self.root, RUNNING_CODE).get(stage):
            return ""
        if self.root.resolve() != RUNNING_CODE and before == self.texts.get(stage):
            # One environment serves two clones: it imports the code of the one installed in it.
            return f"what runs is the code below {RUNNING_CODE}: set PYTHONPATH={self.root}"
        return self._difference(stage, before)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
