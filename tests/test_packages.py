"""The installed and the locked packages: servers that import, hashes, no host."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from flows.records.provenance import locked_packages


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


def test_what_is_locked_for_this_interpreter_is_installed(root: Path) -> None:
    from importlib.metadata import version

    locked = locked_packages((root / "requirements-dev.lock").read_text(encoding="utf-8"))
    assert len(locked) > 300
    assert {name: version(name) for name in locked} == locked


def test_of_a_package_that_is_locked_twice_the_fitting_version_counts() -> None:
    minor = sys.version_info[1]
    text = (
        f"a==1.0 ; python_full_version < '3.{minor}' \\\n    --hash=sha256:0\n"
        f"a==2.0 ; python_full_version >= '3.{minor}' \\\n    --hash=sha256:1\n"
        "b==3.0 \\\n    --hash=sha256:2\n"
    )
    assert locked_packages(text) == {"a": "2.0", "b": "3.0"}
