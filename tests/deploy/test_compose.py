"""The compose file: structure, ports, passwords, versions, and its scripts on a real PostgreSQL."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.services import postgres
from flows.services import servers as services
from flows.tracking import tier

# Of the Compose Specification: what these services may use.
SERVICE_KEYS = {
    *("build", "cap_drop", "command", "depends_on", "environment", "healthcheck", "image", "init"),
    *("ports", "profiles", "restart", "security_opt", "stop_grace_period", "stop_signal"),
    "volumes",
}
HEALTH_KEYS = {"test", "interval", "timeout", "retries", "start_period"}
CONDITIONS = {"service_started", "service_healthy", "service_completed_successfully"}
VARIABLE = re.compile(r"(?<!\$)\$\{(\w+)(:[-?])?([^}]*)\}")


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    return root / "deploy"


@pytest.fixture(scope="module")
def compose(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "compose.yaml").read_text())
    return found


def test_services_use_known_keys_and_refer_to_what_exists(
    compose: dict[str, Any], folder: Path
) -> None:
    assert {key for key in compose if not key.startswith("x-")} == {"name", "services", "volumes"}
    for name, service in compose["services"].items():
        assert set(service) <= SERVICE_KEYS, name
        assert "image" in service, name
        assert set(service.get("healthcheck", {})) <= HEALTH_KEYS
        for other, how in service.get("depends_on", {}).items():
            assert other in compose["services"]
            assert set(how) <= {"condition", "restart", "required"}
            assert how["condition"] in CONDITIONS
            if how["condition"] == "service_healthy":
                assert "healthcheck" in compose["services"][other]
            # Without `required: false` a service of a profile would be started with everything.
            optional = "profiles" in compose["services"][other]
            assert not optional or "profiles" in service or how["required"] is False
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            there = (
                (folder / source).is_file() if source[0] == "." else source in compose["volumes"]
            )
            assert there, volume


def test_every_port_is_open_on_loopback_only(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert "ports" not in compose["services"]["postgres"]


def test_no_password_has_a_default_and_each_is_made(folder: Path, tmp_path: Path) -> None:
    for name in ("make-secrets.sh", "compose.yaml"):
        shutil.copy2(folder / name, tmp_path / name)
    for _ in range(2):
        subprocess.run(["./make-secrets.sh"], cwd=tmp_path, check=True, timeout=60)
        written = (tmp_path / ".env").read_text()
    made = dict(line.split("=", 1) for line in written.splitlines() if line[0] != "#")
    assert len(set(made.values())) == len(made)
    assert min(map(len, made.values())) == 48
    clients = (tmp_path / "clients.env").read_text()
    assert made["MLFLOW_TRACKING_PASSWORD"] in clients
    assert made["POSTGRES_PASSWORD"] not in clients
    for name in (".env", "clients.env"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    used = VARIABLE.findall((folder / "compose.yaml").read_text())
    secret = {name for name, _, _ in used if "PASSWORD" in name or "KEY" in name}
    assert secret == set(made)
    assert all(kind == ":?" for name, kind, _ in used if name in secret)
    assert all(kind == ":-" for name, kind, _ in used if name not in secret)


def test_clients_variables_are_those_of_the_served_tier(folder: Path, tmp_path: Path) -> None:
    shutil.copy2(folder / "make-secrets.sh", tmp_path / "make-secrets.sh")
    subprocess.run(["./make-secrets.sh"], cwd=tmp_path, check=True, timeout=60)
    lines = (tmp_path / "clients.env").read_text().splitlines()
    said = dict(line.split("=", 1) for line in lines)
    known = tier.Secrets(*["x"] * 6)
    expected = tier.client_environment(tier.ServedTier(postgres_port=5432), known)
    expected["MLFLOW_TRACKING_PASSWORD"] = said["MLFLOW_TRACKING_PASSWORD"]
    expected["PREFECT_API_AUTH_STRING"] = said["PREFECT_API_AUTH_STRING"]
    assert said == expected
    assert said["PREFECT_API_AUTH_STRING"].startswith("admin:")


def test_the_image_has_the_locked_versions(folder: Path, root: Path) -> None:
    text = (folder / "Dockerfile").read_text()
    pinned = dict(re.findall(r"([a-z0-9]+)(?:\[\w+\])?==([\d.]+)", text))
    lock = dict(re.findall(r"^(\S+)==(\S+)", (root / "requirements-dev.lock").read_text(), re.M))
    assert set(pinned) == {"asyncpg", "boto3", "fastapi", "mlflow", "prefect", "psycopg"}
    assert pinned == {name: lock[name] for name in pinned}


def test_the_databases_are_those_of_the_served_tier(folder: Path, tmp_path: Path) -> None:
    try:
        postgres.find_programs()
    except services.ServiceError as problem:
        pytest.skip(str(problem))
    if shutil.which("psql") is None:
        pytest.skip("no psql (Debian: postgresql-client)")
    psycopg = pytest.importorskip("psycopg")
    known = tier.Secrets("super", 'it\'s "quoted"', "mlflow", "x", "y", "z")
    port = services.free_port()
    server = postgres.start(tmp_path, port, known)
    try:
        environment = {
            **os.environ,
            "POSTGRES_USER": tier.SUPERUSER,
            "PREFECT_DATABASE_PASSWORD": known.prefect_database,
            "MLFLOW_DATABASE_PASSWORD": known.mlflow_database,
            "PGHOST": tier.LOOPBACK,
            "PGPORT": str(port),
            "PGPASSWORD": known.superuser,
        }
        subprocess.run([folder / "create-databases.sh"], env=environment, check=True, timeout=60)
        login = {"host": tier.LOOPBACK, "port": port}
        for database, owner in tier.DATABASES.items():
            for role in set(tier.DATABASES.values()):
                words = {"user": role, "password": known.database_password(role)}
                if role == owner:
                    with psycopg.connect(**login, **words, dbname=database) as connection:
                        connection.execute("create table probe (value int)")
                else:
                    with pytest.raises(psycopg.OperationalError, match="permission denied"):
                        psycopg.connect(**login, **words, dbname=database)
    finally:
        services.stop_service(server)
