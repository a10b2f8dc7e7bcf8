"""Whether results hang together: what a stage read is what the stages before it wrote, and is here.

By dvc.lock. A stage that ran alone (`ultraflux run --until slices`) leaves later results in place
that were made from other data; whoever says where a result comes from asks here first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.files.weight_folders import file_digest, folder_digest
from flows.history.run_evidence import Evidence
from flows.versioning.lock_hashes import dep_hashes, out_hashes


class ChainBroken(RuntimeError):
    """A result was made from something else than is here; one line."""


def locked_chain(lock: Mapping[str, Any], stages: Sequence[str]) -> list[dict[str, Any]]:
    """Stage, inputs and outputs (DVC hash by path) of stages in the order of the graph.

    Raises:
        ChainBroken: one has not run, or read something else than a stage before it wrote.
    """
    chain: list[dict[str, Any]] = []
    made: dict[str, str] = {}
    for stage in stages:
        if stage not in lock:
            raise ChainBroken(f"{stage} has not run: run `ultraflux run`")
        inputs, outputs = dep_hashes(lock[stage]), out_hashes(lock[stage])
        for path, md5 in inputs.items():
            if path in made and made[path] != md5:
                raise ChainBroken(
                    f"{stage} read another {path} than there is now: run `ultraflux run`"
                )
        made |= outputs
        chain.append({"stage": stage, "inputs": inputs, "outputs": outputs})
    return chain


def check_file(root: Path, path: str, md5: str) -> None:
    """Compare a file with its hash.

    Raises:
        ChainBroken: it has another.
    """
    if file_digest(root / path, "md5") != md5:
        raise ChainBroken(f"{path} is not what dvc.lock says: run `ultraflux run`")


def check_weights(evidence: Evidence, path: str, md5: str) -> str:
    """sha256 of a folder of weights that a run wrote as dvc.lock has them.

    Raises:
        ChainBroken: they are others.
    """
    digest = folder_digest(evidence.root / path)
    if not any(run.outputs.get(path) == md5 for run in evidence.makers_of_weights(digest)):
        raise ChainBroken(f"{path} is not what dvc.lock says: run `ultraflux run`")
    return digest
