from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from components.settings.runtime import RuntimeSettings
from components.settings.schema import load_settings
from components.training.distributed.rank_jobs import rank_main, run_in_ranks

ROOT = Path(__file__).resolve().parents[4]


class Errand(BaseModel):
    """The smallest job."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: RuntimeSettings
    state_dir: Path
    steps: tuple[int, ...]


@pytest.fixture
def errand(tmp_path: Path) -> Errand:
    runtime = load_settings(ROOT / "params.yaml").runtime
    return Errand(runtime=runtime, state_dir=tmp_path / "state", steps=(1, 2))


def test_a_job_of_one_process_is_done_right_here(errand: Errand) -> None:
    done: list[Errand] = []
    run_in_ranks(errand, "no.such.module", done.append)
    assert done == [errand]
    # No job file and no logs: what is there was the state's lock.
    assert [path.name for path in errand.state_dir.iterdir()] == ["lock"]


def test_a_rank_gets_the_job_from_its_file(
    errand: Errand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "job.json"
    path.write_text(errand.model_dump_json(indent=1))
    monkeypatch.setattr("sys.argv", ["worker", str(path)])
    done: list[Errand] = []
    rank_main(Errand, "no.such.module", done.append, ())
    assert done == [errand]


@pytest.mark.parametrize("problem", [KeyError("gone"), OSError("busy")])
def test_a_rank_says_whether_its_failure_would_come_back(
    errand: Errand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    path, report = tmp_path / "job.json", tmp_path / "error.json"
    path.write_text(errand.model_dump_json())
    monkeypatch.setattr("sys.argv", ["worker", str(path)])
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    monkeypatch.setenv("RANK", "3")

    def fail(_: Errand) -> None:
        raise problem

    # A lasting one is said by the launcher, in one line: its trace is in the report alone.
    with pytest.raises(SystemExit if isinstance(problem, LookupError) else type(problem)):
        rank_main(Errand, "no.such.module", fail, (LookupError,))
    said = json.loads(report.read_text())
    assert said["rank"] == 3
    assert said["lasting"] is isinstance(problem, LookupError)
    assert "in fail" in said["message"]["extraInfo"]["py_callstack"]
