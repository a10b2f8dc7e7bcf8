"""Which stages of the real graph a change of settings makes stale, on a lock of real hashes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.corpus.listing.source_table import describe_source
from components.engine.map_items import EngineLimits
from components.settings.schema import load_settings
from flows.remote.lock_entries import stale_without_data
from flows.versioning.code_files import write_code_files
from flows.versioning.graph import stage_graph, stale_stages
from flows.versioning.source_listing import TABLE


def describe(root: Path) -> None:
    """As the stage `source` does."""
    settings = load_settings(root / "params.yaml")
    describe_source(settings.ingest, root / TABLE, root=root, limits=EngineLimits.of(settings))


@pytest.fixture(scope="module")
def finished(clone: Callable[..., Path]) -> Path:
    """The project with a file in place of every output, and a lock that says all stages ran."""
    root = clone("finished", {}, ["ng-32703.jpg"])
    described = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    for stage in described.values():
        outputs = [*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]
        for output in outputs:
            path = root / (output if isinstance(output, str) else next(iter(output)))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{path.name}\n")
    (root / "data" / "code").unlink()
    write_code_files(root)
    (root / TABLE).unlink()
    describe(root)
    # DVC itself hashes what is there and writes the lock, without running anything.
    subprocess.run([sys.executable, "-m", "dvc", "commit", "-q", "--force"], cwd=root, check=True)
    assert stale_stages(root, stage_graph(root)) == {}
    return root


def changed_directly(root: Path) -> tuple[set[str], set[str]]:
    """Stages that DVC would run for their own sake, and all that would be looked at."""
    reasons = stale_stages(root, stage_graph(root))
    return {name for name, reason in reasons.items() if not reason.startswith("after ")}, set(
        reasons
    )


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("select.min_entropy_bits", 6.5, {"select", "validate", "slices"}),
        ("caption.max_words", 131, {"caption"}),
        ("signals.flat_variance", 700.0, {"signals"}),
        ("images.rows", "all", set()),
    ],
)
def test_a_setting_makes_stale_the_stages_that_read_it(
    finished: Path, setting: str, value: Any, expected: set[str]
) -> None:
    params = finished / "params.yaml"
    before = params.read_text()
    values = yaml.safe_load(before)
    section, key = setting.split(".")
    assert values[section][key] != value
    values[section][key] = value
    params.write_text(yaml.safe_dump(values, sort_keys=False))
    try:
        changed, stale = changed_directly(finished)
    finally:
        params.write_text(before)
    assert changed == expected
    if setting.startswith("select."):
        assert not stale & {"ingest", "signals", "quality", "people"}
    if setting.startswith("caption."):
        assert not stale & {"ingest", "signals", "quality", "people", "select"}


def test_a_new_photograph_is_noticed_by_the_table_of_the_source_alone(finished: Path) -> None:
    """Stages below are decided by what is in it: the same images, nothing to do."""
    path = finished / "data" / "sample" / "new.jpg"
    path.write_bytes(b"\xff\xd8\xff")
    try:
        changed, stale = changed_directly(finished)
        assert changed == {"source"}
        assert {"ingest", "caption", "signals"} < stale
    finally:
        path.unlink()


def test_a_clone_that_never_listed_the_source_compares_contents(finished: Path) -> None:
    """For a pipeline whose workers have clones of their own: names and times say nothing here."""
    graph = stage_graph(finished)
    shutil.rmtree(finished / "runs" / "listing")
    assert "files in data/sample" in stale_stages(finished, graph)["source"]
    assert stale_without_data(finished, graph) == {}
    path = finished / "data" / "sample" / "ng-32703.jpg"
    before = path.read_bytes()
    path.write_bytes(before[:-1] + b"x")
    try:
        assert "files in data/sample" in stale_without_data(finished, graph)["source"]
    finally:
        path.write_bytes(before)
    assert stale_without_data(finished, graph) == {}
    kept = {path.name for path in (finished / "runs" / "listing").iterdir()}
    assert kept == {"files.sqlite", "written.json"}
    describe(finished)


def test_photographs_may_go_when_source_is_frozen(finished: Path) -> None:
    text = (finished / "dvc.yaml").read_text()
    aside = finished / "runs" / "sample"
    aside.parent.mkdir(exist_ok=True)
    (finished / "dvc.yaml").write_text(text.replace("  source:\n", "  source:\n    frozen: true\n"))
    shutil.move(finished / "data" / "sample" / "ATTRIBUTION.csv", aside)
    try:
        assert changed_directly(finished) == (set(), set())
    finally:
        (finished / "dvc.yaml").write_text(text)
        shutil.move(aside, finished / "data" / "sample" / "ATTRIBUTION.csv")
    # A move is a change of the file to whoever looks at times; its content is the same.
    assert changed_directly(finished)[0] == {"source"}
    describe(finished)
    assert stale_stages(finished, stage_graph(finished)) == {}
