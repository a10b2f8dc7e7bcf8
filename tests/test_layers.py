"""The layers of the tree: who may import whom, and what must never exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

FORBIDDEN_BELOW = {"prefect", "mlflow", "dvc", "great_expectations", "typer", "flows"}


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, top-level module) of every import in a file, also inside functions."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.append((node.lineno, node.module.split(".")[0]))
    return found


def test_components_import_no_orchestrator(root: Path) -> None:
    offending = [
        f"{path.relative_to(root)}:{line} imports {module}"
        for path in sorted((root / "components").rglob("*.py"))
        for line, module in imports(path)
        if module in FORBIDDEN_BELOW
    ]
    assert offending == []


def test_stage_modules_do_not_know_prefect_dvc_or_mlflow(root: Path) -> None:
    offending = [
        f"{path.relative_to(root)}:{line} imports {module}"
        for path in sorted((root / "flows" / "stages").glob("*.py"))
        for line, module in imports(path)
        if module in {"prefect", "mlflow", "dvc", "typer"}
    ]
    assert offending == []


def test_the_mlflow_folder_holds_no_python(root: Path) -> None:
    assert list((root / "mlflow").rglob("*.py")) == []


def test_import_mlflow_finds_the_library_from_the_repository_root(root: Path) -> None:
    code = "import importlib.util; print(importlib.util.find_spec('mlflow').origin)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("__init__.py")


def test_no_module_is_longer_than_500_lines(root: Path) -> None:
    long = [
        str(path.relative_to(root))
        for folder in ("components", "flows", "tests")
        for path in (root / folder).rglob("*.py")
        if len(path.read_text(encoding="utf-8").splitlines()) > 500
    ]
    assert long == []


def test_prefect_server_imports_with_the_locked_fastapi() -> None:
    from prefect.server.api.server import create_app

    assert callable(create_app)


@pytest.mark.parametrize(
    "name", ["requirements.lock", "requirements-dev.lock", "requirements-bootstrap.lock"]
)
def test_locks_are_hashed_and_name_no_host(root: Path, name: str) -> None:
    text = (root / name).read_text(encoding="utf-8")
    assert "://" not in text
    assert "--index-url" not in text
    assert "--find-links" not in text
    for block in text.replace("\\\n", " ").splitlines():
        if "==" in block:
            assert "--hash=sha256:" in block, block[:60]


def test_the_test_environment_is_the_run_environment_and_more(root: Path) -> None:
    pins = {
        name: set(re.findall(r"^[\w.-]+==\S+", (root / name).read_text("utf-8"), re.MULTILINE))
        for name in ("requirements.lock", "requirements-dev.lock")
    }
    assert pins["requirements.lock"]
    assert pins["requirements.lock"] < pins["requirements-dev.lock"]
