"""Process-wide switches: what the user has set stays, and what results rest on is set."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from flows import environment


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Variables of a process that begins; the test's own are back afterwards."""
    began = {"PATH": "/usr/bin:/bin"}
    monkeypatch.setattr(os, "environ", began)
    return began


def test_telemetry_is_off_and_what_the_user_has_set_stays(environ: dict[str, str]) -> None:
    environ |= {"MLFLOW_HTTP_REQUEST_TIMEOUT": "99", "HF_HUB_OFFLINE": "0"}
    environment.prepare(offline=True)
    assert environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "99"
    assert environ["HF_HUB_OFFLINE"] == "0"
    others = environment.SWITCHES.items() - {("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")}
    assert others <= environ.items()


def test_only_who_asks_for_it_is_offline(environ: dict[str, str]) -> None:
    environment.prepare()
    assert "HF_HUB_OFFLINE" not in environ
    environment.prepare(offline=True)
    assert environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("given", "hosts"),
    [
        ({}, []),
        ({"no_proxy": "example.com"}, ["example.com"]),
        ({"NO_PROXY": "example.com, .intern"}, ["example.com", ".intern"]),
        ({"no_proxy": "a.org,127.0.0.1", "NO_PROXY": "b.org,"}, ["a.org", "127.0.0.1", "b.org"]),
    ],
)
def test_no_proxy_stands_before_this_machine_in_either_spelling(
    environ: dict[str, str], given: dict[str, str], hosts: list[str]
) -> None:
    environ |= given
    for _ in range(2):
        environment.prepare()
        assert environ["no_proxy"] == environ["NO_PROXY"]
        assert environ["no_proxy"].split(",") == list(
            dict.fromkeys([*hosts, "127.0.0.1", "localhost", "::1"])
        )


def test_the_number_of_threads_is_that_of_the_settings_alone(environ: dict[str, str]) -> None:
    # It decides the order of sums, and with it the weights.
    environ["OMP_NUM_THREADS"] = "64"
    environment.prepare(torch_threads=2)
    assert environ["OMP_NUM_THREADS"] == "2"
    environment.prepare()
    assert environ["OMP_NUM_THREADS"] == "2"


def test_programs_of_this_environment_come_first_and_once(environ: dict[str, str]) -> None:
    programs = str(Path(sys.executable).parent)
    for _ in range(2):
        environment.prepare()
        assert environ["PATH"] == f"{programs}:/usr/bin:/bin"


def test_compiled_kernels_lie_in_the_clone_unless_somebody_has_chosen_a_place(
    environ: dict[str, str], tmp_path: Path
) -> None:
    environment.prepare()
    assert "TORCHINDUCTOR_CACHE_DIR" not in environ
    environment.prepare(root=tmp_path)
    assert environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "runs" / "compiled")
    environment.prepare(root=tmp_path / "another")
    assert environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "runs" / "compiled")
