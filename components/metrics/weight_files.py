"""Weights of learned metrics: where they are, whether they are the right ones, how to get them.

A metric's files are looked for below `weights/`, then in the caches that other programs fill
(Hugging Face's, torch hub's); nothing is fetched. Looking costs milliseconds and imports nothing
heavy. A file whose name carries the first digits of its sha256, as torch hub's do, is checked
against them; for the others the first verification records the digest in `weights/digests.json`
and later ones compare with it. Entries of the record are sealed: one that was edited by hand
vouches for nothing and is said, so that other weights do not pass under it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from components.files.weight_folders import WeightsMissing, file_digest, folder_digest
from components.files.whole_files import write_text
from components.metrics.metric_card import MetricCard
from components.metrics.metric_weights import Weights, place_of

RECORD = "digests.json"
_NAMED_DIGEST = re.compile(r"-([0-9a-f]{8})\.(?:pth|pt|safetensors)$")

State = Literal["missing", "unchecked", "recorded", "ok", "wrong"]


@dataclass(frozen=True)
class Verdict:
    """What a verification found."""

    path: str
    """As the card has it."""
    state: State
    detail: str
    """sha256, or why it is wrong or missing."""


def find(name: str, weights: Weights, weights_dir: Path) -> Path:
    """The file or folder.

    Args:
        name: of the metric, for the message.
        weights: from its card.
        weights_dir: the repository's `weights/`.

    Raises:
        WeightsMissing: with file, size, licence and command.
    """
    if (place := place_of(weights, weights_dir)) is not None:
        return place
    detail = f"{weights.size}, licence: {weights.license}"
    raise WeightsMissing(f"{name} weights", weights_dir / weights.path, weights.command, detail)


def _stamp(path: Path) -> list[list[Any]]:
    """Names, sizes and times: whether a recorded digest may be believed without reading."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    stats = [(file, file.stat()) for file in files]
    return [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def _read_record(weights_dir: Path) -> dict[str, Any]:
    record = weights_dir / RECORD
    if not record.is_file():
        return {}
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(
            f"{record}: not a record of digests; delete it and run ultraflux weights verify"
        )
    return values


def _seal(path: str, entry: Mapping[str, Any]) -> str:
    """Of an entry; what a hand that changes a digest or a stamp does not change along."""
    sealed = [path, entry.get("sha256"), entry.get("files")]
    return sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


def _entry(weights: Weights, weights_dir: Path) -> tuple[dict[str, Any], str]:
    """What is recorded of weights, and why it may not be believed."""
    entry = _read_record(weights_dir).get(weights.path)
    if entry is None:
        return {}, ""
    if isinstance(entry, dict) and entry.get("seal") == _seal(weights.path, entry):
        return entry, ""
    return {}, (
        f"the entry of {weights.path} in {RECORD} was not written by this program as it is; remove "
        "it and run ultraflux weights verify"
    )


def _write_record(weights_dir: Path, values: Mapping[str, Any]) -> None:
    weights_dir.mkdir(parents=True, exist_ok=True)
    write_text(
        weights_dir / RECORD, json.dumps(values, indent=2, sort_keys=True) + "\n", contended=True
    )


def _sha256(path: Path) -> str:
    return file_digest(path) if path.is_file() else folder_digest(path)


def _named_digest(path: Path) -> str | None:
    found = _NAMED_DIGEST.search(path.name)
    return found.group(1) if found else None


def verify(name: str, weights: Weights, weights_dir: Path) -> Verdict:
    """Read everything and compare; record what was never seen.

    Args:
        name: of the metric.
        weights: from its card.
        weights_dir: the repository's `weights/`.

    Raises:
        ValueError: the record cannot be read.
    """
    try:
        path = find(name, weights, weights_dir)
    except WeightsMissing as problem:
        return Verdict(weights.path, "missing", problem.command)
    digest = _sha256(path)
    expected = _named_digest(path)
    if expected is not None and not digest.startswith(expected):
        return Verdict(weights.path, "wrong", f"sha256 {digest}, its name says {expected}...")
    if weights.sha256 not in (None, digest):
        return Verdict(weights.path, "wrong", f"sha256 {digest}, expected {weights.sha256}")
    entry, edited = _entry(weights, weights_dir)
    if edited:
        return Verdict(weights.path, "wrong", edited)
    known = entry.get("sha256")
    if known is not None and known != digest:
        return Verdict(weights.path, "wrong", f"sha256 {digest}, recorded was {known}")
    found: dict[str, Any] = {"sha256": digest, "files": _stamp(path)}
    sealed = found | {"seal": _seal(weights.path, found)}
    _write_record(weights_dir, _read_record(weights_dir) | {weights.path: sealed})
    is_vouched = known or expected or weights.sha256
    return Verdict(weights.path, "ok" if is_vouched else "recorded", digest)


def trusted_digest(name: str, weights: Weights, weights_dir: Path) -> tuple[Path, str]:
    """The place and the digest of weights that are about to be loaded.

    A recorded digest counts while names, sizes and times are as recorded; otherwise the files are
    read and verified.

    Raises:
        WeightsMissing: not there, or not the right ones.
    """
    path = find(name, weights, weights_dir)
    entry, _ = _entry(weights, weights_dir)
    if entry.get("files") == _stamp(path):
        return path, str(entry["sha256"])
    verdict = verify(name, weights, weights_dir)
    if verdict.state == "wrong":
        raise WeightsMissing(f"{name} weights", path, weights.command, verdict.detail)
    return path, verdict.detail


def parts(weights: Weights) -> tuple[Weights, ...]:
    """The weights themselves, then each further file that the metric needs."""
    return (weights, *weights.also)


def trusted_files(metric: MetricCard, weights_dir: Path) -> tuple[tuple[Path, ...], str]:
    """All that a metric loads, and one digest of it.

    Args:
        metric: a card with weights.
        weights_dir: the repository's `weights/`.

    Returns:
        Places in the order of `parts`, and the sha256 (of the digests, where there are several).

    Raises:
        WeightsMissing: something is missing (known before anything is read) or wrong.
    """
    assert metric.weights is not None
    every = parts(metric.weights)
    # All are looked for before any is read: hashing 17 GB to learn that a tokenizer is missing
    # would take minutes.
    for part in every:
        find(metric.name, part, weights_dir)
    found = [trusted_digest(metric.name, part, weights_dir) for part in every]
    digests = [digest for _, digest in found]
    joined = digests[0] if len(digests) == 1 else sha256(" ".join(digests).encode()).hexdigest()
    return tuple(path for path, _ in found), joined


def state(name: str, weights: Weights, weights_dir: Path) -> State:
    """Whether weights are there and were ever verified; reads no weights."""
    try:
        path = find(name, weights, weights_dir)
    except WeightsMissing:
        return "missing"
    entry, edited = _entry(weights, weights_dir)
    if edited:
        return "wrong"
    return "ok" if entry.get("files") == _stamp(path) else "unchecked"
