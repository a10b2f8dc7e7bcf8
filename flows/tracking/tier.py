"""Which servers a project uses: the embedded ones (SQLite), or the served tier (PostgreSQL).

`ultraflux up --served` writes `runs/services/served.json`; from then on every run of the project
talks to those servers, also while they are down (records wait on disk and are sent later).
`ultraflux up --embedded` goes back. Passwords are generated once, stand in files that only their
owner can read, and never on a command line.

    secrets.json    what the servers need
    pgpass          PostgreSQL passwords in libpq's format (PGPASSFILE)
    mlflow-auth.ini where MLflow keeps its users
    clients.env     what clients need; `set -a; . runs/services/clients.env` for other programs

Both tiers ask for a login: any page in a browser and any account of this machine can send requests
to a port on the loopback.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, unquote

from flows.environment import PROJECT, project_name
from flows.records.records import TornJson, from_json, read_whole_json, write_json

_Kind = TypeVar("_Kind")
LOOPBACK = "127.0.0.1"
SUPERUSER = "postgres"
DATABASES = {"prefect": "prefect", "mlflow": "mlflow", "mlflow_auth": "mlflow"}
"""Owner by database; MLflow keeps users and permissions apart from runs."""
ADMIN = "admin"
"""Who logs in to MLflow, and to Prefect where that asks."""
PREFECT_RETRIES = 8
"""Doubling from 2 s: clients of Prefect outlast a server or database that is away for 8 minutes."""


def services_dir(root: Path) -> Path:
    """`runs/services`: databases, artifacts, passwords."""
    return root / "runs" / "services"


def sqlite_address(file: Path, driver: str = "sqlite") -> str:
    """SQLAlchemy's address of a SQLite file, whatever the folders above it are called."""
    name = str(file)
    if "?" in name or "%" in name:
        # Slashes, too: MLflow makes the folder above this name without decoding it.
        name = quote(name, safe="")
    return f"{driver}:///{name}"


def sqlite_file(address: str) -> Path:
    """The file of an address `sqlite:///...`."""
    return Path(unquote(address.removeprefix("sqlite:///")))


def is_loopback(host: str) -> bool:
    """Whether `host` can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class ServedTier:
    """Content of served.json."""

    postgres_port: int
    prefect_port: int = 4200
    mlflow_port: int = 5000
    host: str = LOOPBACK
    """Where Prefect and MLflow listen; PostgreSQL never leaves 127.0.0.1."""
    artifacts: str = ""
    """Where MLflow keeps artifacts: an absolute path or a URI such as s3://bucket/prefix."""
    prefect_login: bool = True
    """Whether Prefect asks for a password (always, where `host` is not loopback)."""

    @property
    def client_host(self) -> str:
        """Where clients on this machine find the servers."""
        everywhere = self.host in {"0.0.0.0", "::"}  # an address to listen on, none to call
        return LOOPBACK if everywhere else self.host

    def database_uri(self, database: str, driver: str) -> str:
        """SQLAlchemy URI without a password: that one comes from PGPASSFILE."""
        owner = DATABASES[database]
        return f"postgresql+{driver}://{owner}@{LOOPBACK}:{self.postgres_port}/{database}"


@dataclass(frozen=True)
class Secrets:
    """Content of secrets.json."""

    superuser: str
    prefect_database: str
    mlflow_database: str
    mlflow_admin: str
    mlflow_session: str
    """Key of MLflow's form tokens."""
    prefect_login: str

    def database_password(self, role: str) -> str:
        """Password of a PostgreSQL role."""
        return {
            SUPERUSER: self.superuser,
            "prefect": self.prefect_database,
            "mlflow": self.mlflow_database,
        }[role]


def served_tier(root: Path) -> ServedTier | None:
    """The served tier of this project; None: the project is embedded."""
    return _read(
        ServedTier,
        services_dir(root) / "served.json",
        "remove it, then run `ultraflux up --served` (or --embedded) again with its options",
    )


def use_served(root: Path, tier: ServedTier) -> Secrets:
    """Make the project use the served tier; returns its passwords, new ones the first time."""
    folder = services_dir(root)
    mine = own_secrets(root)
    lines = [
        f"{LOOPBACK}:{tier.postgres_port}:*:{role}:{mine.database_password(role)}"
        for role in (SUPERUSER, *sorted(set(DATABASES.values())))
    ]
    _write_private(passfile(root), "\n".join(lines) + "\n")
    write_clients(root, client_environment(tier, mine))
    write_json(folder / "served.json", asdict(tier))
    return mine


def own_secrets(root: Path) -> Secrets:
    """The project's passwords: drawn once, in a file that its owner alone can read."""
    path = services_dir(root) / "secrets.json"
    lost = (
        "restore it from a backup, or run `ultraflux down` and remove it with mlflow-users.db "
        "beside it; the databases of the served tier open with these passwords alone"
    )
    known = _read(Secrets, path, lost)
    if known is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = {item.name: secrets.token_urlsafe(24) for item in fields(Secrets)}
        # Two commands may come first at the same time: one of them wins, for both.
        _write_private(path, json.dumps(drawn, indent=1), replace=False)
        known = _read(Secrets, path, lost)
    if known is None:
        raise TornJson(f"{path} holds nothing: {lost}")
    return known


def _read(cls: type[_Kind], path: Path, remedy: str) -> _Kind | None:
    """A file that must not count as missing: another tier or other passwords would be used.

    Raises:
        TornJson: it is not whole, or of another shape; says what to do.
    """
    try:
        values = read_whole_json(path)
        return None if values is None else from_json(cls, values, path)
    except TornJson as problem:
        raise TornJson(f"{problem}: {remedy}") from None


def write_clients(root: Path, environment: Mapping[str, str]) -> None:
    """Write clients.env for shells and for clones that work with this one's servers."""
    values = {**environment, PROJECT: project_name(root)}
    text = "".join(f"{name}={value}\n" for name, value in values.items())
    _write_private(services_dir(root) / "clients.env", text)


def embedded_clients(root: Path, prefect_url: str, mlflow_url: str) -> dict[str, str]:
    """Variables with which clients find the servers of `ultraflux up` and log in."""
    known = own_secrets(root)
    return {
        "PREFECT_API_URL": f"{prefect_url}/api",
        "PREFECT_API_AUTH_STRING": login_to_prefect(known),
        "MLFLOW_TRACKING_URI": mlflow_url,
        "MLFLOW_TRACKING_USERNAME": ADMIN,
        "MLFLOW_TRACKING_PASSWORD": known.mlflow_admin,
    }


def login_to_prefect(known: Secrets) -> str:
    """What Prefect's server asks for and its clients send."""
    return f"{ADMIN}:{known.prefect_login}"


AUTH_SETTINGS = """\
[mlflow]
default_permission = READ
database_uri = {uri}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
"""
"""Users that the administrator adds may read everything and change what is their own. Without the
cache every request would hash its password slowly, as is right for a password."""


def mlflow_login(root: Path, users: str) -> dict[str, str]:
    """Variables of an MLflow server that asks for a login; writes mlflow-auth.ini.

    Args:
        root: repository root.
        users: SQLAlchemy URI of the database with its users.
    """
    known = own_secrets(root)
    settings = services_dir(root) / "mlflow-auth.ini"
    # Of what stands in an ini file Python's reader takes a percent sign for a reference.
    uri = users.replace("%", "%%")
    settings.write_text(AUTH_SETTINGS.format(uri=uri), encoding="utf-8")
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_USERNAME": ADMIN,
        "MLFLOW_AUTH_ADMIN_PASSWORD": known.mlflow_admin,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": known.mlflow_session,
    }


def use_embedded(root: Path) -> None:
    """Make the project use the embedded servers; databases of the served tier stay."""
    (services_dir(root) / "served.json").unlink(missing_ok=True)


def passfile(root: Path) -> Path:
    """PGPASSFILE of the project."""
    return services_dir(root) / "pgpass"


def client_environment(tier: ServedTier, known: Secrets) -> dict[str, str]:
    """Variables with which Prefect's and MLflow's clients find the servers and log in."""
    address = f"http://{tier.client_host}"
    environment = {
        "PREFECT_API_URL": f"{address}:{tier.prefect_port}/api",
        "PREFECT_CLIENT_MAX_RETRIES": str(PREFECT_RETRIES),
        # What the server answers while its database is away.
        "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500",
        "MLFLOW_TRACKING_URI": f"{address}:{tier.mlflow_port}",
        "MLFLOW_TRACKING_USERNAME": ADMIN,
        "MLFLOW_TRACKING_PASSWORD": known.mlflow_admin,
    }
    if tier.prefect_login:
        environment["PREFECT_API_AUTH_STRING"] = login_to_prefect(known)
    return environment


def served_clients(root: Path) -> dict[str, str]:
    """`client_environment` of a project in the served tier, otherwise nothing."""
    tier = served_tier(root)
    if tier is None:
        return {}
    return client_environment(tier, own_secrets(root))


def _write_private(path: Path, text: str, *, replace: bool = True) -> None:
    """Write a file that only its owner can read, whole or not at all.

    Args:
        path: the file.
        text: its content.
        replace: whether a file that is there already gives way.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # O_EXCL below: a file that somebody else has put there would keep its owner and its mode.
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    if replace:
        temporary.replace(path)
        return
    with suppress(FileExistsError):
        os.link(temporary, path)
    temporary.unlink()
