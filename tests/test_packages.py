"""The installed and the locked packages: servers that import, hashes, no host."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


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
