"""The folder of an evaluation: one run at a time, and a run that failed replaces no good result."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from components.evaluation.suites.suite_scores import SuiteResult
from components.evaluation.suites.suites import Suite
from components.files.holder_locks import held_alone
from components.files.whole_files import whole_file, write_text

LOCK = ".evaluate.lock"
FAILED = "failed"
"""Folder below a good result for what a run that failed has to say."""


class FolderTaken(ValueError):
    """Another run writes to the folder; one line."""


@contextmanager
def taken(folder: Path) -> Iterator[None]:
    """Have the folder to oneself until the block, or the process, ends.

    Raises:
        FolderTaken: another run has it.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def refusal(holder: str) -> FolderTaken:
        return FolderTaken(
            f"{folder}: another run (process {holder}) writes there; wait until it has ended, or "
            "give another --out"
        )

    # Writable for others, too: the folder may be a group's.
    with held_alone(folder / LOCK, str(os.getpid()), refusal, mode=0o666):
        yield


def _is_good(folder: Path) -> bool:
    """Whether a complete result lies there."""
    try:
        found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        return not found["failed_systems"] and (folder / "scores.parquet").is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def finite(described: Any) -> Any:
    """What JSON can hold: null for what is not finite, such as an end that is not bounded."""
    return json.loads(json.dumps(described), parse_constant=lambda _: None)


def write_result(result: SuiteResult, suite: Suite, out_dir: Path) -> Path:
    """`scores.parquet`, `metrics.json`, and for reports on this machine `pictures.jsonl`.

    Returns:
        Where they are: `out_dir`, or below it where a system of this run failed and the result of
        an earlier run was complete.
    """
    folder = out_dir / FAILED if result.failed_systems and _is_good(out_dir) else out_dir
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "scores.parquet") as temporary:
        result.table.to_parquet(temporary, index=False)
    lines = [json.dumps(picture, ensure_ascii=False) for picture in result.pictures]
    write_text(folder / "pictures.jsonl", "\n".join(lines) + "\n")
    description: dict[str, Any] = {
        "suite": suite.name,
        "protocol": suite.protocol,
        "items": len(suite.items),
        "metrics": result.metrics,
        "unavailable": dict(sorted(result.unavailable.items())),
        "failed_systems": dict(sorted(result.failed_systems.items())),
        # Three files are no one file: a reader sees by the digest that they are of one run.
        "scores_sha256": hashlib.sha256((folder / "scores.parquet").read_bytes()).hexdigest(),
        "sizes": result.sizes,
        "other_sizes": dict(sorted(result.other_sizes.items())),
        "notes": result.notes,
    }
    if result.looks:
        description["looks"] = {name: asdict(one) for name, one in sorted(result.looks.items())}
    if result.set_comparisons:
        description["set_comparisons"] = [asdict(one) for one in result.set_comparisons]
    text = json.dumps(finite(description), indent=2, sort_keys=True, allow_nan=False)
    write_text(folder / "metrics.json", text + "\n")
    return folder
