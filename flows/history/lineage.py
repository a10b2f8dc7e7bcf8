"""Where a picture, a model or a run came from, and what a photograph went into.

Back: picture -> weights -> registered versions -> training runs -> slice rows -> photographs.
Forth: photograph -> manifest row -> slices -> training runs -> weights -> pictures. Every step
compares hashes (see `flows.history.run_evidence`); what a clone does not hold is a node of kind
`missing` that says how to get it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.files.weight_folders import file_digest
from flows.history.run_evidence import Evidence, StageRun
from flows.records.records import ACCEPTED_TAG, Record, all_records, records_dir
from flows.tracking.registry import RegisteredWeights, registered_weights

if TYPE_CHECKING:
    import pandas as pd

SLICES_DIR = "data/slices/"
TRAINING = ("vae", "dit_stage1", "dit_stage2")
_MANIFESTS = tuple(f"data/{s}/manifest.parquet" for s in ("slices", "caption", "select", "ingest"))
_ROW_COLUMNS = (
    "image_id",
    "uri",
    "license",
    "photographer",
    "image_url",
    "work_url",
    "source",
    "kept",
    "split",
    "reject_reason",
)
_RUN_TAGS = {
    "commit": "mlflow.source.git.commit",
    "dirty": "git.dirty",
    "changes_sha256": "git.diff_sha256",
    "settings_sha256": "settings.sha256",
    "packages_sha256": "lock.sha256",
    "stage_key": "ultraflux.stage_key",
    "host": "host",
    "accepted": ACCEPTED_TAG,
}
PAST = ("segments.", "divergence.")
"""Tags with a number: under what a training's steps ran, and which of them were left out."""


@dataclass
class Node:
    """One step of a walk."""

    kind: str
    """picture, weights, version, run, pipeline, slice, photograph, row or missing."""
    title: str
    facts: dict[str, Any] = field(default_factory=dict)
    children: list[Node] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "kind": self.kind,
            "title": self.title,
            "facts": self.facts,
            "children": [child.to_json() for child in self.children],
        }

    def walk(self) -> Iterator[Node]:
        """This node and all below it."""
        yield self
        for child in self.children:
            yield from child.walk()


def missing(what: str, fix: str) -> Node:
    """Something that the walk needs and the clone does not hold."""
    return Node("missing", what, {"fix": fix})


class Lineage:
    """Walks over one clone's evidence.

    Args:
        evidence: runs and files.
        limit: rows and pictures shown below one node; counts are always whole.
    """

    def __init__(self, evidence: Evidence, *, limit: int = 10) -> None:
        self.evidence = evidence
        self.limit = limit
        self._shown: set[tuple[str, str]] = set()
        self._above: dict[str, frozenset[str]] = {}
        self.versions = self._versions()

    def _versions(self) -> list[RegisteredWeights]:
        """The registry's, or what records say was sent to it."""
        if self.evidence.client is not None:
            found = registered_weights(self.evidence.client)
            if found:
                return found
        # Without a server (or with an empty registry) the records still know what was sent to it.
        kept = {}
        for record in all_records(self.evidence.root):
            result = record.result
            for promotion in result.promotions if result else []:
                alias = (promotion["alias"],) if promotion["alias"] else ()
                known = RegisteredWeights(
                    promotion["model"], "", promotion["digest"], promotion["path"], alias
                )
                kept[known.model, known.digest] = known
        return list(kept.values())

    # Pictures

    def picture(self, path: Path, fields: dict[str, str]) -> Node:
        """A generated picture with its embedded fields, back to photographs."""
        digest = file_digest(path)
        found = self._generation(digest, fields.get("ultraflux_key", ""))
        parts = {
            name.removeprefix("sha256_"): value
            for name, value in fields.items()
            if name.startswith("sha256_")
        }
        shown = {k: v for k, v in fields.items() if not k.startswith("sha256_")}
        node = Node("picture", path.name, {"sha256": digest, **shown})
        self._explain_picture(node, found, parts)
        return node

    def known_picture(self, run: StageRun, line: dict[str, Any]) -> Node:
        """A picture of the stage `generate`, by its line in generations.jsonl."""
        node = self._picture_line(line)
        self._explain_picture(node, (run, line), line["digests"])
        return node

    def _picture_line(self, line: dict[str, Any]) -> Node:
        facts = {k: line[k] for k in ("prompt", "seed", "key")}
        size = f"{line['height']}x{line['width']}"
        return Node(
            "picture", line["file"], {"sha256": line["image_sha256"], "size": size, **facts}
        )

    def _generation(self, sha256: str, key: str) -> tuple[StageRun, dict[str, Any]] | None:
        for run, line in self.generations():
            # By the key too: a picture whose file was saved anew has other bytes and the same
            # origin.
            if line["image_sha256"] == sha256 or (key and line["key"] == key):
                return run, line
        return None

    def generations(self) -> Iterator[tuple[StageRun, dict[str, Any]]]:
        """Every picture of the stage `generate` that can be read, newest run first."""
        for run in reversed(self.evidence.runs):
            if run.stage == "generate":
                for line in self.evidence.generations(run):
                    yield run, line

    def _explain_picture(
        self,
        node: Node,
        found: tuple[StageRun, dict[str, Any]] | None,
        parts: dict[str, str],
    ) -> None:
        if found is not None:
            run, line = found
            node.facts["made_by"] = run.name
            parts = parts or line["digests"]
            if line["source_image_id"]:
                node.children.append(self._prompt_photograph(run, line["source_image_id"]))
        else:
            node.facts["made_by"] = "the command `ultraflux generate`, or a run that is not here"
        for part in ("transformer", "autoencoder", "text_encoders"):
            if part in parts:
                node.children.append(self.weights(parts[part], part))
        if found is not None:
            node.children.append(self.run(found[0], deep=False))

    def _prompt_photograph(self, run: StageRun, image_id: str) -> Node:
        path = f"{SLICES_DIR}eval.parquet"
        rows = self._table(path, run.inputs.get(path, ""))
        if isinstance(rows, Node):
            return rows
        rows = rows[rows["image_id"] == image_id]
        node = Node(
            "slice", f"{path}: the held-out caption that is the prompt", {"rows": len(rows)}
        )
        node.children = self._photographs(rows)
        return node

    # Weights

    def weights(self, digest: str, part: str = "weights") -> Node:
        """Weights by sha256: their registered versions and the run that made them."""
        node = Node("weights", f"{part} {digest[:16]}", {"sha256": digest})
        node.children = [
            Node(
                "version",
                known.title,
                {
                    "model": known.model,
                    "version": known.version,
                    "aliases": list(known.aliases),
                    "path": known.path,
                },
            )
            for known in self.versions
            if known.digest == digest
        ]
        makers = self.evidence.makers_of_weights(digest)
        if makers:
            node.children.append(self.run(makers[-1]))
        else:
            node.children.append(
                missing(
                    f"the run that made {part} {digest[:16]}",
                    "published weights have none; else start MLflow, or use the clone that "
                    "trained them",
                )
            )
        return node

    # Runs

    def run(self, run: StageRun, *, deep: bool = True) -> Node:
        """A stage run with what it read; a run met twice is explained once."""
        node = Node("run", f"{run.stage}  {run.name}", self._run_facts(run))
        if not deep:
            return node
        if ("run", run.name) in self._shown:
            node.facts["explained"] = "above"
            return node
        self._shown.add(("run", run.name))
        if not run.inputs:
            node.children.append(
                missing(f"what {run.name} read", "its record has no input hashes; run it again")
            )
        for path, md5 in sorted(run.inputs.items()):
            if run.stage in TRAINING and path.startswith(SLICES_DIR):
                node.children.append(self._slice(path, md5))
        made_by = self._producers(run)
        for path in sorted(run.inputs):
            if path.startswith("data/") and path not in made_by and self._is_output(path):
                what = f"the run that made {path} ({run.inputs[path]})"
                node.children.append(
                    missing(what, "start MLflow, or use the clone in which it ran")
                )
        # A run that another one has read already is below that one.
        direct = {producer.name: producer for producer in made_by.values()}
        reached = set().union(*(self._ancestors(producer) for producer in direct.values()))
        node.children += [self.run(direct[name]) for name in direct if name not in reached]
        return node

    def _producers(self, run: StageRun) -> dict[str, StageRun]:
        """By input path: the run that made what `run` read there."""
        found = {path: self.evidence.producer(path, md5) for path, md5 in run.inputs.items()}
        return {path: producer for path, producer in sorted(found.items()) if producer is not None}

    def _ancestors(self, run: StageRun) -> frozenset[str]:
        """Names of all runs that `run` rests on."""
        if run.name not in self._above:
            direct = {producer.name: producer for producer in self._producers(run).values()}
            further = (self._ancestors(producer) for producer in direct.values())
            self._above[run.name] = frozenset(direct).union(*further)
        return self._above[run.name]

    def _is_output(self, path: str) -> bool:
        """Whether any known run writes this path."""
        return any(path in run.outputs for run in self.evidence.runs)

    def _run_facts(self, run: StageRun) -> dict[str, Any]:
        facts: dict[str, Any] = {"run_id": run.run_id, "record": run.record_id}
        if run.started_ms:
            started = datetime.fromtimestamp(run.started_ms / 1000, UTC)
            facts["started"] = started.isoformat(timespec="seconds")
        facts |= {name: run.tags[tag] for name, tag in _RUN_TAGS.items() if tag in run.tags}
        if run.parent:
            facts["pipeline"] = run.parent
            lock = records_dir(self.evidence.root) / run.parent / "dvc.lock"
            if lock.is_file():
                facts["dvc_lock_sha256"] = file_digest(lock)
        for tag in ("latents.encoder", "text_encoders.digest"):
            if tag in run.tags:
                facts[tag] = run.tags[tag]
        past = [
            tag for tag in run.tags if tag.startswith(PAST) and tag.rpartition(".")[2].isdigit()
        ]
        for tag in sorted(
            past, key=lambda tag: (tag.partition(".")[0], int(tag.rpartition(".")[2]))
        ):
            facts[tag] = run.tags[tag]
        facts["data_in"] = {p: h for p, h in sorted(run.inputs.items()) if p.startswith("data/")}
        facts["outputs"] = dict(sorted(run.outputs.items()))
        facts |= {f"weights.{name}": digest for name, digest in sorted(run.weights().items())}
        return {name: value for name, value in facts.items() if value not in ("", {})}

    def pipeline(self, record: Record) -> Node:
        """A pipeline run: the runs that made each stage's result, then back from the last ones."""
        run, result = record.run, record.result
        tags = run.tags | (result.tags if result else {})
        facts = {name: tags[tag] for name, tag in _RUN_TAGS.items() if tag in tags}
        facts |= {"run_id": record.mlflow_run_id or "", "status": result.status if result else ""}
        lock = record.folder / "dvc.lock"
        if lock.is_file():
            facts["dvc_lock_sha256"] = file_digest(lock)
        node = Node("pipeline", record.record_id, facts)
        made = {value for tag, value in tags.items() if tag.endswith(".run_id")}
        runs = [r for r in self.evidence.runs if {r.run_id, r.record_id} & made]
        for stage_run in reversed(runs):
            node.children.append(self.run(stage_run))
        return node

    # Rows

    def _table(self, path: str, md5: str) -> pd.DataFrame | Node:
        from components.corpus.manifest import read_table

        file = self.evidence.file(path, md5) if md5 else None
        if file is None:
            return missing(f"the rows of {path} ({md5 or 'hash unknown'})", "`dvc fetch`")
        try:
            return read_table(file, _ROW_COLUMNS)
        except ValueError as problem:
            return missing(f"the rows of {path}", str(problem))

    def _slice(self, path: str, md5: str) -> Node:
        rows = self._table(path, md5)
        if isinstance(rows, Node):
            return rows
        use = "held out" if path == f"{SLICES_DIR}eval.parquet" else "trained on"
        node = Node("slice", path, {"md5": md5, "rows": len(rows), "use": use})
        if ("slice", md5) in self._shown:
            node.facts["explained"] = "above"
            return node
        self._shown.add(("slice", md5))
        node.children = self._photographs(rows)
        return node

    def _photographs(self, rows: pd.DataFrame) -> list[Node]:
        """The originals of some rows, checked against their sha256."""
        from components.images.original_lookup import OriginalLookup

        shown = rows.head(self.limit)
        nodes = []
        originals = OriginalLookup(self.evidence.root).find_each(shown)
        for row, original in zip(shown.to_dict("records"), originals, strict=True):
            facts = {"sha256": row["image_id"]}
            names = ("license", "photographer", "image_url", "work_url", "source")
            facts |= {n: row[n] for n in names if isinstance(row.get(n), str)}
            try:
                original.read_bytes()
                facts["original"] = "here, sha256 checked"
            except OSError as problem:
                facts["original"] = f"not here: {problem.strerror}"
            nodes.append(Node("photograph", str(row["uri"]), facts))
        if len(rows) > len(shown):
            nodes.append(Node("row", f"{len(rows) - len(shown)} more (--limit)"))
        return nodes

    # Forth

    def photograph(self, image_id: str, path: str = "") -> Node | None:
        """A photograph forward to what it went into; None where no manifest names it."""
        # The furthest one first: it says most, and an earlier one only matters where that is gone.
        for manifest in _MANIFESTS:
            versions = {r.outputs[manifest]: r for r in self.evidence.runs if manifest in r.outputs}
            node = Node("photograph", path or image_id, {"sha256": image_id})
            for md5, run in versions.items():
                rows = self._table(manifest, md5)
                if isinstance(rows, Node):
                    node.children.append(rows)
                    continue
                rows = rows[(rows["image_id"] == image_id) | (rows["uri"] == path)]
                for row in rows.to_dict("records"):
                    values = {str(name): value for name, value in row.items()}
                    node.children.append(self._row_forth(values, run))
            if any(child.kind == "row" for child in node.children):
                node.children += self._prompted(image_id)
                return node
        return None

    def _row_forth(self, row: dict[str, Any], run: StageRun) -> Node:
        facts = {k: v for k, v in row.items() if isinstance(v, str | bool)}
        node = Node("row", f"{row['uri']}  (corpus of {run.name})", facts)
        for path, md5 in sorted(run.outputs.items()):
            if not path.startswith(SLICES_DIR) or not path.endswith(".parquet"):
                continue
            # The manifest of slices is no slice: it holds every row.
            if path == _MANIFESTS[0]:
                continue
            rows = self._table(path, md5)
            if isinstance(rows, Node):
                node.children.append(rows)
            elif rows["image_id"].eq(row["image_id"]).any():
                part = Node("slice", path, {"md5": md5, "rows": len(rows)})
                users = [r for r in self.evidence.consumers(path, md5) if r.stage in TRAINING]
                part.children = [self.run_forth(user) for user in users]
                node.children.append(part)
        return node

    def _prompted(self, image_id: str) -> list[Node]:
        lines = [line for _, line in self.generations() if line["source_image_id"] == image_id]
        return self._pictures(lines)

    def _pictures(self, lines: list[dict[str, Any]]) -> list[Node]:
        nodes = [self._picture_line(line) for line in lines[: self.limit]]
        if len(lines) > self.limit:
            nodes.append(Node("row", f"{len(lines) - self.limit} more pictures (--limit)"))
        return nodes

    def run_forth(self, run: StageRun) -> Node:
        """A run with what was made from its outputs: runs, weights, versions, pictures."""
        node = self.run(run, deep=False)
        if ("forth", run.name) in self._shown:
            node.facts["explained"] = "above"
            return node
        self._shown.add(("forth", run.name))
        node.children = [self.weights_forth(d, n) for n, d in sorted(run.weights().items())]
        users: dict[str, StageRun] = {}
        for path, md5 in run.outputs.items():
            for user in self.evidence.consumers(path, md5):
                if user.stage in TRAINING:
                    users.setdefault(user.name, user)
        node.children += [self.run_forth(user) for user in users.values()]
        return node

    def weights_forth(self, digest: str, part: str) -> Node:
        """Weights with their registered versions and the pictures made with them."""
        node = Node("weights", f"{part} {digest[:16]}", {"sha256": digest})
        node.children = [Node("version", k.title) for k in self.versions if k.digest == digest]
        made = [line for _, line in self.generations() if digest in line["digests"].values()]
        node.facts["pictures"] = len(made)
        node.children += self._pictures(made)
        return node
