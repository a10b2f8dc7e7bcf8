"""Which servers a project uses: settings, passwords, what clients are told."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from flows.commands.refusals import FAILED, refusal
from flows.records.records import (
    RunDescription,
    RunResult,
    TornJson,
    open_record,
    unsent_records,
    write_json,
)
from flows.services import postgres, served
from flows.services import servers as services
from flows.services import status as services_status
from flows.services.embedded_prefect import embedded_prefect
from flows.services.workers import Worker
from flows.tracking import tier
from flows.tracking.uploader import Uploader, tracking_uri


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def _no_tracking_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "PREFECT_API_URL",
        "MLFLOW_TRACKING_URI",
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
    ):
        # Set first, so that what the code under test sets is taken back too.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_passwords_are_random_and_only_their_owner_reads_them(toy: Path, tmp_path: Path) -> None:
    known = tier.use_served(toy, tier.ServedTier(postgres_port=5433))
    other = tier.use_served(tmp_path, tier.ServedTier(postgres_port=5433))
    words = [*vars(known).values(), *vars(other).values()]
    assert len(set(words)) == len(words) == 12
    assert min(map(len, words)) >= 32
    folder = tier.services_dir(toy)
    for name in ("secrets.json", "pgpass", "clients.env"):
        assert mode(folder / name) == 0o600, name
    assert known.superuser not in (folder / "clients.env").read_text()
    assert not any(word in (folder / "served.json").read_text() for word in vars(known).values())


def test_passwords_stay_when_the_tier_is_set_again(toy: Path) -> None:
    first = tier.use_served(toy, tier.ServedTier(postgres_port=5433))
    assert tier.use_served(toy, tier.ServedTier(postgres_port=5434)) == first
    assert ":5434:" in tier.passfile(toy).read_text()


def test_clients_find_the_server_and_its_login_until_the_project_goes_back(toy: Path) -> None:
    assert tracking_uri(toy).startswith("sqlite:")
    known = tier.use_served(toy, tier.ServedTier(postgres_port=5433, mlflow_port=5055))
    assert tracking_uri(toy) == "http://127.0.0.1:5055"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "admin"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == known.mlflow_admin
    tier.use_embedded(toy)
    assert tracking_uri(toy).startswith("sqlite:")


def test_a_shell_can_read_the_clients_variables(toy: Path) -> None:
    known = tier.use_served(toy, tier.ServedTier(postgres_port=5433))
    script = f". {tier.services_dir(toy) / 'clients.env'}; echo $MLFLOW_TRACKING_PASSWORD"
    said = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == known.mlflow_admin


@pytest.mark.parametrize(
    ("host", "inside"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("box", False)],
)
def test_only_loopback_addresses_count_as_inside(host: str, inside: bool) -> None:
    assert tier.is_loopback(host) is inside


@pytest.mark.parametrize(
    ("host", "called"), [("0.0.0.0", "127.0.0.1"), ("::", "127.0.0.1"), ("box", "box")]
)
def test_clients_call_an_address_and_not_the_one_that_stands_for_all(
    tmp_path: Path, host: str, called: str
) -> None:
    known = tier.own_secrets(tmp_path)
    told = tier.client_environment(tier.ServedTier(postgres_port=5433, host=host), known)
    assert told["PREFECT_API_URL"] == f"http://{called}:4200/api"
    assert told["MLFLOW_TRACKING_URI"] == f"http://{called}:5000"


def test_what_a_killed_process_left_lends_a_password_neither_its_mode_nor_its_owner(
    tmp_path: Path,
) -> None:
    folder = tier.services_dir(tmp_path)
    folder.mkdir(parents=True)
    for name in ("secrets.json", "clients.env"):
        # Of a process that had this one's number.
        left = folder / f".{name}.{os.getpid()}"
        left.write_text("")
        left.chmod(0o644)
    tier.write_clients(tmp_path, tier.embedded_clients(tmp_path, "http://a", "http://b"))
    assert mode(folder / "secrets.json") == mode(folder / "clients.env") == 0o600
    assert sorted(path.name for path in folder.iterdir()) == ["clients.env", "secrets.json"]


def test_prefect_clients_wait_longer_and_log_in_where_it_asks(toy: Path) -> None:
    plain = services.prefect_environment(toy, 4200)
    assert "PREFECT_CLIENT_MAX_RETRIES" not in plain
    drawn = tier.own_secrets(toy)
    assert plain["PREFECT_API_AUTH_STRING"] == f"admin:{drawn.prefect_login}"
    assert plain["PREFECT_SERVER_API_AUTH_STRING"] == plain["PREFECT_API_AUTH_STRING"]
    known = tier.use_served(toy, tier.ServedTier(postgres_port=5433, prefect_login=True))
    assert known == drawn
    served_one = services.prefect_environment(toy, 4200)
    assert int(served_one["PREFECT_CLIENT_MAX_RETRIES"]) > 5
    assert served_one["PREFECT_API_AUTH_STRING"] == f"admin:{known.prefect_login}"


@pytest.mark.parametrize("name", ["served.json", "secrets.json"])
def test_a_torn_file_of_the_tier_is_one_line_with_what_to_do(toy: Path, name: str) -> None:
    tier.use_served(toy, tier.ServedTier(postgres_port=5433))
    (tier.services_dir(toy) / name).write_text("")
    with pytest.raises(TornJson, match=r"is not JSON .*remove it") as found:
        tier.served_clients(toy)
    assert refusal(found.value, ["status"]) == (str(found.value), FAILED)
    assert str(found.value).startswith(str(tier.services_dir(toy) / name))
    assert services.down(toy) == []


def test_a_run_does_not_start_a_server_of_its_own_beside_a_served_one(toy: Path) -> None:
    tier.use_served(toy, tier.ServedTier(postgres_port=5433))
    refused = pytest.raises(services.ServiceError, match=r"ultraflux up`, or .* --embedded")
    with refused, embedded_prefect(toy):
        pass


def test_a_server_that_the_environment_names_is_used_as_it_is(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier.use_served(toy, tier.ServedTier(postgres_port=5433))
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere:4200/api")
    with embedded_prefect(toy):
        assert os.environ["PREFECT_API_URL"] == "http://elsewhere:4200/api"
    assert not (toy / "runs" / "logs").exists()


def test_missing_programs_name_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    with pytest.raises(services.ServiceError, match="apt install postgresql"):
        postgres.find_programs()


def test_data_of_another_major_version_are_refused(toy: Path) -> None:
    try:
        programs = postgres.find_programs()
    except services.ServiceError as problem:
        pytest.skip(str(problem))
    data = tier.services_dir(toy) / "postgres"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("9\n")
    with pytest.raises(services.ServiceError, match="made by PostgreSQL 9"):
        postgres.initialise(programs, data, "x")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "add --served"),
        (["--artifacts", "s3://bucket"], "add --served"),
        (["--embedded", "--postgres-port", "1"], "add --served"),
    ],
)
def test_options_of_the_served_tier_need_it(toy: Path, arguments: list[str], said: str) -> None:
    done = subprocess.run(["ultraflux", "up", *arguments], cwd=toy, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_a_missing_package_is_named_before_anything_starts(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(served.PACKAGES, "no_such_module", "no-such-package")
    with pytest.raises(
        services.ServiceError, match=r"no-such-package.*pip install -e '\.\[serve\]'"
    ):
        served.up(toy, tier.ServedTier(postgres_port=1))
    assert tier.served_tier(toy) is None


def test_a_second_attempt_that_ended_is_to_be_sent_although_the_first_was(tmp_path: Path) -> None:
    described = RunDescription(kind="stage", name="vae", stage_key="k")
    record = open_record(tmp_path, described)
    record.finish(RunResult(status="FAILED", ended_ms=5))
    write_json(record.folder / "mlflow.json", {"run_id": "x", "ended_ms": 5})
    assert len(unsent_records(tmp_path)) == 0
    again = open_record(tmp_path, described)
    assert again == record
    assert len(unsent_records(tmp_path)) == 0  # it goes on
    again.finish(RunResult(status="FINISHED", ended_ms=9))
    assert len(unsent_records(tmp_path)) == 1


def test_status_names_a_server_that_died_and_counts_what_mlflow_misses(
    toy: Path,
    typed: Callable[..., subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert services_status.examine(toy).well
    gone = services.Service("mlflow", "http://127.0.0.1:1", 2**22 + 1, "log")
    services.remember(toy, gone)
    record = open_record(toy, RunDescription(kind="pipeline", name="pipeline"))
    assert len(unsent_records(toy)) == 0  # still going on
    record.finish(RunResult(status="FINISHED", ended_ms=5))
    found = services_status.examine(toy)
    assert [server.state for server in found.servers] == ["died"]
    assert not found.well
    assert found.unsent == 1
    write_json(record.folder / "mlflow.json", {"run_id": "x", "ended_ms": 5})
    assert len(unsent_records(toy)) == 0
    monkeypatch.setenv("COLUMNS", "20")
    done = typed(toy, "status")
    assert done.returncode == 1
    assert done.stdout.splitlines()[0] == "mlflow: died (http://127.0.0.1:1, log: log)"
    monkeypatch.setenv("COLUMNS", "80")
    done = typed(toy, "status")
    assert "│ mlflow │ died  │" in done.stdout
    assert "ultraflux up" in done.stdout


def test_status_names_workers_that_run_and_those_that_died(toy: Path) -> None:
    name = "machine-gpu-1"
    with subprocess.Popen(
        [sys.executable, "-c", "input()", name], stdin=subprocess.PIPE, cwd=toy
    ) as alive:
        known = [Worker("gpu", name, alive.pid, "log"), Worker("cpu", "other", alive.pid, "log")]
        write_json(services.services_dir(toy) / "workers.json", [asdict(one) for one in known])
        done = subprocess.run(["ultraflux", "status"], cwd=toy, capture_output=True, text=True)
        alive.kill()
    assert done.returncode == 1
    assert f"worker gpu: runs (pid {alive.pid}" in done.stdout
    assert "worker cpu: died" in done.stdout
    assert "ultraflux up --workers" in done.stdout


def test_a_server_that_was_started_again_keeps_its_place_in_the_order(toy: Path) -> None:
    """`down` stops in reverse: PostgreSQL must stay below what stands on it."""
    for name in ("postgres", "prefect", "mlflow"):
        services.remember(toy, services.Service(name, "x:1", 2**22 + 1, ""))
    again = services.Service("postgres", "x:1", 2**22 + 2, "")
    services.remember(toy, again)
    assert [s.name for s in services.known_services(toy)] == ["postgres", "prefect", "mlflow"]
    services.stop(toy, [again])
    assert [s.name for s in services.known_services(toy)] == ["prefect", "mlflow"]


@pytest.mark.slow
def test_finished_runs_stay_in_their_store_and_open_ones_begin_anew_in_the_next(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = open_record(toy, RunDescription(kind="stage", name="a", stage_key="1"))
    ended.finish(RunResult(status="FINISHED"))
    running = open_record(toy, RunDescription(kind="stage", name="b", stage_key="2"))
    Uploader(toy).sync()
    before = {record.record_id: record.mlflow_run_id for record in (ended, running)}
    assert all(before.values())

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    second = Uploader(toy)
    running.finish(RunResult(status="FINISHED", metrics={"loss": 1.0}))
    second.sync()
    names = [run.info.run_name for run in second.client.search_runs([second.experiment_id])]
    assert names == ["b"]
    assert ended.mlflow_run_id == before[ended.record_id]
    assert running.mlflow_run_id != before[running.record_id]


def test_a_run_whose_creation_was_not_noted_is_not_created_twice(
    toy: Path, give_store: Callable[[Path], None]
) -> None:
    give_store(toy)
    record = open_record(toy, RunDescription(kind="stage", name="a", stage_key="1"))
    uploader = Uploader(toy)
    uploader.sync()
    (record.folder / "mlflow.json").unlink()  # killed between the request and the note
    Uploader(toy).sync()
    assert len(uploader.client.search_runs([uploader.experiment_id])) == 1


@pytest.mark.parametrize("name", ["plain", "with a space", "größer", "100% sure", "a%3Fb", "a#b?c"])
def test_an_address_of_sqlite_is_that_very_file(tmp_path: Path, name: str) -> None:
    import sqlalchemy

    file = tmp_path / name / "mlflow.db"
    file.parent.mkdir()
    address = tier.sqlite_address(file)
    assert tier.sqlite_file(address) == file
    engine = sqlalchemy.create_engine(address)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("create table runs (name text)"))
    engine.dispose()
    assert file.stat().st_size > 0
    assert list(tmp_path.iterdir()) == [file.parent]
