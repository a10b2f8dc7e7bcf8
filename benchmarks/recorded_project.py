"""A project of files and records that are true in form: nothing is computed, nothing fetched."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from components.corpus.manifest import write_table  # noqa: E402
from components.corpus.selection.attribution import write_attribution  # noqa: E402
from components.files.weight_folders import folder_digest  # noqa: E402
from flows.records.records import RunDescription, RunResult, open_record  # noqa: E402

ROWS = [
    # (image, photographer, split; None: not kept)
    ("tree", "Ann Lee (Unsplash)", "train"),
    ("sea", "Bo Ek", "train"),
    ("hill", "Bo Ek", "eval"),
    ("blur", "Ann Lee", None),
]


def image(name: str) -> str:
    """Its sha256."""
    return hashlib.sha256(name.encode()).hexdigest()


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


LICENSES = ["CC-BY-SA-4.0", "CC0", None, "Public Domain"]


class RecordedProject:
    """A project whose files and records are true in form: no photograph, no network."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock: dict[str, Any] = {}
        self.clock = 0
        shutil.copy(ROOT / "params.yaml", root / "params.yaml")
        (root / "conf").mkdir(exist_ok=True)
        shutil.copy(ROOT / "conf" / "exclusions.csv", root / "conf")

    def run(
        self,
        stage: str,
        inputs: list[str],
        outputs: list[str],
        tags: dict[str, str] | None = None,
    ) -> None:
        """Record a run that read and wrote these paths as they are now."""
        self.clock += 1
        hashes = {path: self.hash(path) for path in inputs}, {p: self.hash(p) for p in outputs}
        made = open_record(
            self.root,
            RunDescription(
                kind="stage",
                name=stage,
                stage_key=f"{stage}-{self.clock}",
                inputs=hashes[0],
                tags={"ultraflux.stage_key": f"{stage}-{self.clock}"},
                started_ms=self.clock,
            ),
        )
        weights = {
            f"weights.{Path(path).name}": folder_digest(self.root / path)
            for path in outputs
            if stage in ("vae", "dit_stage1", "dit_stage2")
        }
        tags = weights | (tags or {})
        made.finish(RunResult(status="FINISHED", tags=tags, ended_ms=self.clock + 1))
        made.set_outputs(hashes[1])
        self.lock[stage] = {
            "cmd": "true",
            "deps": [{"path": p, "md5": h} for p, h in hashes[0].items()],
            "outs": [{"path": p, "md5": h} for p, h in hashes[1].items()],
        }
        document = {"schema": "2.0", "stages": self.lock}
        (self.root / "dvc.lock").write_text(yaml.safe_dump(document))

    def hash(self, path: str) -> str:
        """As DVC writes it: md5 of a file, a digest with .dir of a folder."""
        place = self.root / path
        return f"{folder_digest(place)[:32]}.dir" if place.is_dir() else md5(place)

    def train(self, rows: list[tuple[str, str, str | None]], seed: str, **tags: str) -> None:
        """Every stage from the manifest to a picture's weights."""
        table = pd.DataFrame(
            {
                "image_id": [image(name) for name, _, _ in rows],
                "uri": [f"photos/{name}.jpg" for name, _, _ in rows],
                "photographer": [who for _, who, _ in rows],
                "kept": [split is not None for _, _, split in rows],
                "split": [split for _, _, split in rows],
                "license": LICENSES[: len(rows)],
                "megapixels": 12.5,
                "width": 4000,
                "caption_en": [f"a {name} | at dawn" for name, _, _ in rows],
                "caption_model": "by hand",
                "image_url": [f"https://img.example.org/{name}.jpg" for name, _, _ in rows],
            }
        )
        self.write("ingest/manifest", table.drop(columns=["kept", "split"]))
        self.run("ingest", [], ["data/ingest/manifest.parquet"])
        train, held_out = (table[table["split"] == split] for split in ("train", "eval"))
        parts = {"manifest": table, "vae": train, "stage1": train, "stage2": train}
        parts |= {"ablation": train, "eval": held_out}
        for name, part in parts.items():
            self.write(f"slices/{name}", part)
            if name != "manifest":
                folder = self.root / "data" / "slices"
                whole = {name: np.arange(len(part))}
                write_attribution(folder / f"{name}.parquet", whole, folder / "attribution")
        cut = {name: f"data/slices/{name}.parquet" for name in parts}
        self.run("slices", ["data/ingest/manifest.parquet"], list(cut.values()))
        for stage in ("latents", "text_embeddings"):
            folder = self.root / "data" / stage
            folder.mkdir(parents=True, exist_ok=True)
            kept = table[table["kept"]][["image_id"]]
            kept.to_parquet(folder / "index.parquet")
        self.weights("vae", ["autoencoder"], seed)
        self.run("vae", [cut["vae"], cut["eval"]], ["data/vae/autoencoder"])
        self.run("latents", [cut["stage1"], cut["eval"]], ["data/latents"])
        self.run("text_embeddings", [cut["manifest"]], ["data/text_embeddings"])
        stores, read = ["data/latents", "data/text_embeddings"], [cut["stage1"]]
        for stage in ("dit_stage1", "dit_stage2"):
            self.weights(stage, ["raw", "ema"], seed)
            made = [f"data/{stage}/raw", f"data/{stage}/ema"]
            self.run(stage, [*stores, *read], made, tags)
            read = [cut["stage2"], *made]

    def evaluate(self, metrics: dict[str, float], card: str) -> None:
        """What papers say of a model: its card, numbers and the counts of selection."""
        (self.root / "data/dit_stage2/ema/README.md").write_text(card, encoding="utf-8")
        for name, value in (
            ("evaluate/metrics", metrics),
            ("select/summary", {"candidates": 4, "kept": 3, "rejected_entropy": 1}),
        ):
            path = self.root / "data" / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value), encoding="utf-8")
        # The card is part of the weights that training wrote.
        entry = self.lock["dit_stage2"]
        inputs, outputs = ([one["path"] for one in entry[kind]] for kind in ("deps", "outs"))
        self.run("dit_stage2", inputs, outputs)

    def write(self, name: str, table: pd.DataFrame) -> None:
        """A manifest below data/."""
        path = self.root / "data" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(table, path)

    def weights(self, stage: str, parts: list[str], seed: str) -> None:
        """Folders of weights that another seed makes others."""
        for part in parts:
            folder = self.root / "data" / stage / part
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "w.safetensors").write_text(f"{stage} {part} {seed}")
