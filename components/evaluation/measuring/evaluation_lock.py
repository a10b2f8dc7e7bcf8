"""What an evaluation's numbers depend on, kept beside them, so that a second run can be held to it.

`evaluation.lock.json` names the suite with a digest of what it asks for, the protocol and the
weights of every metric, how systems sampled, and the fingerprint of the code that measures. A run
into a folder with another lock is refused: numbers of two protocols would stand in one table.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import components
from components.evaluation.measuring.evaluation_run import OpenedMetrics
from components.evaluation.suites.suites import Suite
from components.files.code_identity import PACKAGES, CodeIdentity
from components.files.whole_files import write_text
from components.metrics.cards import card

LOCK = "evaluation.lock.json"
MEASURING = "components.evaluation.suites.suite_scores"
"""The module whose closure decides numbers, metrics and decoding included."""
_VERSION = 1
_SHOWN = 12
"""Digits of a digest in messages."""


class LockDiffers(ValueError):
    """A run that would not measure what the folder's lock says; one line."""


@dataclass(frozen=True)
class EvaluationLock:
    """What numbers depend on beside the systems' pictures."""

    suite: str
    protocol: str
    """Of the suite."""
    items: str
    """sha256 of ids, prompts, sizes, seeds and references' names and bytes' counts."""
    metrics: dict[str, dict[str, str]]
    """By metric id: its `protocol`, and sha256 of its `weights` ("" without any)."""
    asked: dict[str, Any] = field(default_factory=dict)
    """Seed, steps, guidance, number format and refiner that systems were asked with."""
    code: str = ""
    """Fingerprint of `MEASURING` and all that it reaches."""
    version: int = _VERSION

    def differences(
        self, earlier: EvaluationLock, *, sampling: bool = True, code: bool = True
    ) -> list[str]:
        """What of an earlier lock does not hold here; metrics that only one has do not count.

        Args:
            earlier: the other lock.
            sampling: whether systems must have been asked alike.
            code: whether the code must be the same.
        """
        found = [
            f"{name} {getattr(self, name)}, was {getattr(earlier, name)}"
            for name in ("suite", "protocol")
            if getattr(self, name) != getattr(earlier, name)
        ]
        if not found and self.items != earlier.items:
            found.append(f"items {self.items[:_SHOWN]}, were {earlier.items[:_SHOWN]}")
        for metric in sorted(set(self.metrics) & set(earlier.metrics)):
            ours, theirs = self.metrics[metric], earlier.metrics[metric]
            found += [
                f"{name} of {metric} {ours[name][:40]}, was {theirs.get(name, '')[:40]}"
                for name in ("protocol", "weights")
                if ours[name] != theirs.get(name)
            ]
        found += [
            f"{name} {self.asked.get(name)}, was {earlier.asked.get(name)}"
            for name in sorted(set(self.asked) | set(earlier.asked))
            if sampling and self.asked.get(name) != earlier.asked.get(name)
        ]
        if code and self.code != earlier.code:
            found.append(f"code {self.code[:_SHOWN]}, was {earlier.code[:_SHOWN]}")
        return found


def code_fingerprint(root: Path, kept_in: Path) -> str:
    """Fingerprint of `MEASURING`, found again as long as no file of the code has changed.

    Reading what 120 modules mean takes as long as decoding 32 pictures of 4096 x 4096, reading
    their bytes a twentieth of that.

    Args:
        root: the folder that holds the packages.
        kept_in: folder of the fingerprint, named by the code's bytes; it need not be writable.
    """
    digest = hashlib.sha256(sys.version.encode())
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            # Templates of pages too, which a fingerprint may hold.
            if "__pycache__" not in path.parts and path.is_file():
                digest.update(f"{path.relative_to(root)} ".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    kept = kept_in / f"fingerprint-{digest.hexdigest()}.txt"
    with suppress(OSError):
        return kept.read_text(encoding="ascii")
    found = CodeIdentity(root).fingerprint(MEASURING)
    with suppress(OSError):
        kept_in.mkdir(exist_ok=True)
        for earlier in kept_in.glob("fingerprint-*.txt"):
            earlier.unlink(missing_ok=True)
        write_text(kept, found)
    return found


@cache
def _code() -> str:
    """The files that this process has imported from; they are read once."""
    # Beside the interpreter's own cache of these modules, which every ignore list knows.
    here = Path(__file__).parent / "__pycache__"
    return code_fingerprint(Path(components.__file__).parents[1], here)


def lock_of(suite: Suite, opened: OpenedMetrics, asked: Mapping[str, Any]) -> EvaluationLock:
    """The lock of a run that is about to begin.

    Args:
        suite: what is asked for.
        opened: metrics that are there.
        asked: how systems sample; JSON-ready.
    """
    digest = hashlib.sha256()
    for item in suite.items:
        reference = item.reference
        known = reference is not None and reference.is_file()
        line = (
            *(item.id, item.prompt, item.height, item.width, item.seed, item.stratum),
            *((reference.name, reference.stat().st_size) if known and reference else ()),
        )
        digest.update(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    return EvaluationLock(
        suite.name,
        suite.protocol,
        digest.hexdigest(),
        {
            name: {"protocol": card(name).protocol, "weights": metric.weights_digest or ""}
            for metric in opened.metrics
            for name in metric.ids
        },
        dict(asked),
        _code(),
    )


def read_lock(folder: Path) -> EvaluationLock | None:
    """The lock of an evaluation; None where there is none.

    Raises:
        ValueError: a file that is no lock.
    """
    path = folder / LOCK
    try:
        return EvaluationLock(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError) as problem:
        raise ValueError(f"{path}: not an evaluation's lock ({problem}); remove it") from None


def check_lock(lock: EvaluationLock, folder: Path) -> None:
    """Hold a run to the lock of an earlier one in the folder.

    Raises:
        LockDiffers: one does not hold.
    """
    earlier = read_lock(folder)
    if earlier is None or not (found := lock.differences(earlier)):
        return
    raise LockDiffers(
        f"{folder / LOCK}: this run differs: {'; '.join(found)}. Give another --out, or --relock "
        "to replace what is there"
    )


def write_lock(lock: EvaluationLock, folder: Path) -> None:
    """Write the lock beside the numbers; metrics that an earlier lock alone has stay out."""
    write_text(folder / LOCK, json.dumps(asdict(lock), indent=2, sort_keys=True) + "\n")
