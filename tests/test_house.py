"""The house: rooms in one order, no circles, small folders, a library without orchestrators."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    # The ground: schema, whole files, progress, tests of hypotheses.
    "components.settings",
    "components.files",
    "components.telemetry",
    "components.statistics",
    # What a picture, a conversation, a network, a loss is.
    "components.images",
    "components.chat",
    "components.models",
    "components.objectives",
    # Classical signals; one function over many untrusted items.
    "components.signals",
    "components.engine",
    # From candidates to slices, from weights to pictures, from pictures to numbers.
    "components.corpus",
    "components.generation",
    "components.metrics",
    "components.training",
    "components.evaluation",
    "components.papers",
    "components.planning",
    "components.diagnostics",
    # What runs of the library leave behind, and who runs it.
    "flows.environment",
    "flows.records",
    "flows.versioning",
    "flows.tracking",
    "flows.validation",
    "flows.stages",
    "flows.history",
    "flows.running",
    "flows.services",
    "flows.remote",
    "flows.pools",
    "flows.pipeline",
    "flows.experiments",
    "flows.commands",
    "flows.cli",
    "flows.entry",
)
"""From the ground up: a module imports its own room and those above it in this list."""
LARGEST_FOLDER = 15
ORCHESTRATORS = {"prefect", "mlflow", "dvc", "great_expectations", "typer", "flows"}
FILES = sorted(
    path
    for package in ("components", "flows")
    for path in (ROOT / package).rglob("*.py")
    if path.name != "__init__.py"
)


def named(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {dotted(path): path for path in FILES}
IMPORTS = [
    (module, line, name)
    for module, path in MODULES.items()
    for line, name in named(path)
    if name in MODULES and name != module
]


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_every_room_has_its_place_in_the_order() -> None:
    assert {room(module) for module in MODULES} == set(ROOMS)
    assert len(set(ROOMS)) == len(ROOMS)


def test_no_import_runs_against_the_order_of_rooms() -> None:
    against = [
        f"{module.replace('.', '/')}.py:{line} imports {name}"
        for module, line, name in IMPORTS
        if ROOMS.index(room(name)) > ROOMS.index(room(module))
    ]
    assert against == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = networkx.DiGraph((module, name) for module, _, name in IMPORTS)
    circles = [sorted(group) for group in networkx.strongly_connected_components(graph)]
    assert [group for group in circles if len(group) > 1] == []


def test_no_folder_holds_more_modules_than_a_person_reads_at_a_glance() -> None:
    count = Counter(str(path.parent.relative_to(ROOT)) for path in FILES)
    # The stages are the graph of dvc.yaml: one module each.
    del count["flows/stages"]
    assert {folder: n for folder, n in count.items() if n > LARGEST_FOLDER} == {}


def test_components_import_no_orchestrator() -> None:
    offending = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in FILES
        if path.is_relative_to(ROOT / "components")
        for line, name in named(path)
        if name.split(".")[0] in ORCHESTRATORS
    ]
    assert offending == []


def test_stage_modules_do_not_know_prefect_dvc_or_mlflow() -> None:
    offending = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted((ROOT / "flows" / "stages").glob("*.py"))
        for line, name in named(path)
        if name.split(".")[0] in {"prefect", "mlflow", "dvc", "typer"}
    ]
    assert offending == []


def test_no_module_is_longer_than_500_lines() -> None:
    tests = (ROOT / "tests").rglob("*.py")
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in (*FILES, *tests)}
    assert [str(path.relative_to(ROOT)) for path, lines in lengths.items() if lines > 500] == []


def test_tests_mirror_the_tree() -> None:
    """A folder of tests is a folder of code, so that either leads to the other."""
    astray = [
        str(folder.relative_to(ROOT))
        for package in ("components", "flows")
        for folder in sorted((ROOT / "tests" / package).rglob("*"))
        if folder.is_dir()
        and folder.name != "__pycache__"
        and not (ROOT / folder.relative_to(ROOT / "tests")).is_dir()
    ]
    assert astray == []


@pytest.mark.parametrize(
    "module",
    [
        "components.models.resonance_rope",
        "components.models.autoencoder_f16",
        "components.models.transformer",
        "components.models.pipeline",
        "components.objectives.snr_huber",
        "components.objectives.haar",
        "components.objectives.flow_matching",
    ],
)
def test_public_modules_are_where_others_import_them_from(module: str) -> None:
    assert module in MODULES


def test_the_mlflow_folder_holds_no_python() -> None:
    assert list((ROOT / "mlflow").rglob("*.py")) == []


def test_import_mlflow_finds_the_library_from_the_repository_root() -> None:
    code = "import importlib.util; print(importlib.util.find_spec('mlflow').origin)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("__init__.py")
