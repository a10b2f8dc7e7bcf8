"""The certificate that weights descend from data without some photographs.

It is written only after looking: the chain of dvc.lock from the weights back to the slices, every
table on it searched for the photographs, the weights hashed. What it does not say, it says too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import Field

from components.corpus.selection.rights import Exclusion, Exclusions
from components.corpus.selection.slices import SLICES
from components.files.weight_folders import folder_digest
from components.settings.schema import load_settings
from flows.history.affected import Affected, kept_rows
from flows.history.lineage import SLICES_DIR, TRAINING
from flows.history.lock_chain import ChainBroken, check_file, check_weights, locked_chain
from flows.history.run_evidence import Evidence
from flows.records.records import TornJson, from_json
from flows.versioning import graph as versioning
from flows.versioning.lock_hashes import out_hashes

FORMAT = "ultraflux-forgetting-certificate"
VERSION = 1
CHAIN = ("slices", "vae", "latents", "text_embeddings", "dit_stage1", "dit_stage2")
WEIGHTS = {
    "vae": ("autoencoder",),
    "dit_stage1": ("raw", "ema"),
    "dit_stage2": ("raw", "ema"),
}
STORES = ("latents", "text_embeddings")
LIMITS = (
    "Tables of candidates (data/ingest, signals, quality, people, select) still name the "
    "photographs: that is how they are recognised and kept out. Their derivatives are in "
    "data/signals.",
    "Older versions in DVC's cache and remotes, in MLflow and in backups are not deleted by this "
    "(`dvc gc`, `ultraflux clean`).",
    "Copies under another photographer's name, crops and edits are other photographs; those that "
    "were near duplicates are listed.",
)


class NoCertificate(ValueError):
    """A signed statement of another kind; one line."""


@dataclass(frozen=True)
class CertifiedWeights:
    """One folder of weights."""

    # Whoever signs writes what they like, and this folder is hashed.
    path: Annotated[str, Field(pattern=r"^data/\w+/\w+$")]
    sha256: str


@dataclass(frozen=True)
class Forgotten:
    """Whom a certificate is about."""

    entries: Annotated[list[Exclusion], Field(min_length=1)]
    images: Annotated[list[str], Field(min_length=1)]
    photographs_by_entry: list[int] = field(default_factory=list)
    """Older certificates do not say."""


@dataclass(frozen=True)
class Certificate:
    """What is read of a `statement`."""

    issued: str
    forgotten: Forgotten
    weights: Annotated[list[CertifiedWeights], Field(min_length=1)]
    equal_to_a_run_without_them: str


class NotForgotten(ChainBroken):
    """The present weights do not show that they descend from other data; one line."""


def statement(evidence: Evidence, entries: Sequence[Exclusion], before: Affected) -> dict[str, Any]:
    """What can be said of the present weights; see the module.

    Args:
        evidence: of the clone after the rebuild.
        entries: who is forgotten.
        before: what `affected_by` found before.

    Raises:
        ChainBroken: a stage is out of date or has other files than dvc.lock says.
        NotForgotten: a photograph is still in a table or store, or training went on from a state
            of other data.
    """
    root = evidence.root
    images = set(before.images)
    chain = locked_chain(versioning.read_lock(root), CHAIN)
    # Data first: where a photograph is still there, all that follows is the old weights' fault.
    searched = _searched(root, chain, images)
    weights = _weights(evidence, chain, set(before.weights))
    settings = load_settings(root / "params.yaml")
    given = [settings.models.transformer.pretrained, settings.models.autoencoder.pretrained]
    bases = [str(base) for base in given if base is not None]
    return {
        "format": FORMAT,
        "version": VERSION,
        "project": settings.project.name,
        "issued": datetime.now(UTC).isoformat(timespec="seconds"),
        "forgotten": {
            "entries": [{"kind": entry.kind, "value": entry.value} for entry in entries],
            "images": before.images,
            "photographs_by_entry": before.photographs_by_entry,
            "look_alikes_of_others": before.look_alikes,
        },
        "before": {
            "weights": before.weights,
            "registry": [known.title for known in before.versions],
            "pictures": len(before.pictures),
        },
        "weights": weights,
        "chain": chain,
        "searched": searched,
        "determinism": settings.runtime.determinism,
        "equal_to_a_run_without_them": _equality(evidence, settings.runtime.determinism),
        "begun_from": bases or ["random weights"],
        "settings_sha256": hashlib.sha256((root / "params.yaml").read_bytes()).hexdigest(),
        "limits": [
            *LIMITS,
            *(f"What {base} was trained on before is not known here." for base in bases),
        ],
    }


def _searched(
    root: Path, chain: Sequence[Mapping[str, Any]], images: set[str]
) -> list[dict[str, Any]]:
    """Every table and store between the corpus and the weights, with what was found in it."""
    found = []
    for path, md5 in sorted(chain[0]["outputs"].items()):
        if not path.endswith(".parquet"):
            continue
        file = root / path
        check_file(root, path, md5)
        rows = len(pd.read_parquet(file, columns=["image_id"]))
        found.append({"path": path, "md5": md5, "rows": rows, "found": kept_rows(file, images)})
    for store in STORES:
        file = root / "data" / store / "index.parquet"
        index = pd.read_parquet(file)
        hits = int(index["image_id"].isin(images).sum()) if "image_id" in index else 0
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        found.append(
            {
                "path": f"data/{store}/index.parquet",
                "sha256": digest,
                "rows": len(index),
                "found": hits,
            }
        )
    for one in found:
        if one["found"]:
            raise NotForgotten(
                f"{one['path']} still holds {one['found']} of the photographs: "
                "run `ultraflux run`, then ask again"
            )
    return found


def _weights(
    evidence: Evidence, chain: Sequence[Mapping[str, Any]], before: set[str]
) -> list[dict[str, str]]:
    root, found = evidence.root, []
    outputs = {path: md5 for link in chain for path, md5 in link["outputs"].items()}
    for stage, parts in WEIGHTS.items():
        for part in parts:
            path = f"data/{stage}/{part}"
            # First: the weights of before are often what dvc.lock says, too.
            if folder_digest(root / path) in before:
                raise NotForgotten(f"{path} holds the weights of before: run `ultraflux run`")
            digest = check_weights(evidence, path, outputs[path])
            found.append({"path": path, "sha256": digest, "dvc": outputs[path]})
    return found


def _equality(evidence: Evidence, determinism: str) -> str:
    """Whether another run without the photographs would give the same bytes, in a sentence.

    Raises:
        NotForgotten: a present result was trained in segments, of which one may have read them.
    """
    lock = versioning.read_lock(evidence.root)
    for stage in TRAINING:
        outputs = out_hashes(lock[stage])
        made = [run for run in evidence.runs if run.stage == stage and run.outputs == outputs]
        if made and any(name.startswith("segments.") for name in made[-1].tags):
            raise NotForgotten(
                f"{stage} went on from a training state of other data or settings: delete that "
                f"state (`ultraflux stage states {stage}`) and run `dvc repro -s -f {stage}`"
            )
    if determinism != "bitwise":
        return "not claimed: runtime.determinism is not bitwise"
    return (
        "yes: settings, code and packages being equal, a run whose source never held them gives "
        "these bytes on a machine of the same kind"
    )


def read_certificate(said: Mapping[str, Any], file: Path) -> Certificate:
    """A `statement` that somebody signed, perhaps not this code.

    Raises:
        NoCertificate: another format or version, or not its fields.
    """
    if (said.get("format"), said.get("version")) != (FORMAT, VERSION):
        raise NoCertificate(f"no {FORMAT} of version {VERSION}")
    try:
        return from_json(Certificate, said, file)
    except TornJson as problem:
        raise NoCertificate(f"no {FORMAT} ({str(problem).removeprefix(f'{file}: ')})") from None


def differences(root: Path, certificate: Certificate) -> list[str]:
    """Differences between a certificate and the clone that stands here, and what had no comparison.

    Weights are hashed and the slices searched for the photographs, by identity and by name.
    """
    problems = []
    for one in certificate.weights:
        folder = root / one.path
        if not folder.is_dir():
            problems.append(f"{one.path}: not here, so its weights were not compared")
        elif folder_digest(folder) != one.sha256:
            problems.append(f"{one.path}: other weights than the certificate's")
    certified = {one.path for one in certificate.weights}
    for stage, parts in WEIGHTS.items():
        for path in (f"data/{stage}/{part}" for part in parts):
            if path not in certified and (root / path).is_dir():
                problems.append(f"{path}: the certificate says nothing of it")
    images = set(certificate.forgotten.images)
    listed = Exclusions(certificate.forgotten.entries)
    for name in ("manifest", *SLICES):
        file = root / SLICES_DIR / f"{name}.parquet"
        if not file.is_file():
            problems.append(f"{SLICES_DIR}{file.name}: not here, so it was not searched")
        elif rows := kept_rows(file, images | listed.images(file)):
            problems.append(f"{SLICES_DIR}{file.name}: {rows} rows show what was forgotten")
    return problems
