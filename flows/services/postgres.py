"""A PostgreSQL server of the project's own, without root and without a system service.

Data in `runs/services/postgres`, listening on 127.0.0.1 only, passwords from `flows.tracking.tier`.
PostgreSQL refuses to run as root; then it runs as the account `postgres` (or `nobody`), which may
not be allowed to walk down to the data folder. So the folder is opened first and handed over as an
open directory: `/proc/self/fd/N` leads there whatever the folders above allow.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from flows.services.clone_processes import is_running
from flows.services.servers import Service, ServiceError, start_daemon, stop_service
from flows.tracking.tier import DATABASES, LOOPBACK, SUPERUSER, Secrets, services_dir

START_TIMEOUT_S = 60.0
LINGER_S = 15.0
"""How long processes of a killed server may hold its shared memory."""
MAX_CONNECTIONS = 200
INSTALL = "install it (Debian and Ubuntu: apt install postgresql) or put its bin folder in PATH"


@dataclass(frozen=True)
class Programs:
    """PostgreSQL's own programs."""

    folder: Path

    @property
    def major(self) -> str:
        """Major version, as in a data folder's PG_VERSION."""
        said = subprocess.run(
            [str(self.folder / "postgres"), "--version"], capture_output=True, text=True, check=True
        )
        return said.stdout.split()[2].split(".")[0]


def find_programs() -> Programs:
    """`initdb` and `postgres`: in PATH, by pg_config, or the newest in the usual folders.

    Raises:
        ServiceError: not installed; says which package it is in.
    """
    candidates = []
    if (found := shutil.which("postgres")) is not None:
        candidates.append(Path(found).parent)
    if (config := shutil.which("pg_config")) is not None:
        said = subprocess.run([config, "--bindir"], capture_output=True, text=True, check=False)
        candidates.append(Path(said.stdout.strip()))
    usual = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr").glob("pgsql-*/bin")]
    versions = {path: "".join(filter(str.isdigit, str(path))) for path in usual}
    candidates += sorted(usual, key=lambda path: int(versions[path] or 0), reverse=True)
    for folder in candidates:
        if all((folder / name).is_file() for name in ("initdb", "postgres")):
            return Programs(folder)
    raise ServiceError(f"PostgreSQL's programs (initdb, postgres) were not found: {INSTALL}")


def server_account(data: Path) -> pwd.struct_passwd | None:
    """Whom the server runs as; None: as ourselves.

    Raises:
        ServiceError: root, and no account to change to; or the data belong to somebody else.
    """
    owner = data.stat().st_uid if data.exists() else os.geteuid()
    if os.geteuid() != 0:
        if owner != os.geteuid():
            raise ServiceError(f"{data} belongs to another user: start the servers as that one")
        return None
    if owner != 0:
        return pwd.getpwuid(owner)
    for name in (SUPERUSER, "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise ServiceError(
        f"PostgreSQL refuses to run as root and there is no account for it: {INSTALL}"
    )


@contextmanager
def _data_folder(data: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The data folder as the server sees it, and how to start programs on it."""
    account = server_account(data)
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    if account is None:
        yield str(data), {}
        return
    os.chown(data, account.pw_uid, account.pw_gid)
    opened = os.open(data, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield (
            f"/proc/self/fd/{opened}",
            {
                "pass_fds": (opened,),
                "user": account.pw_uid,
                "group": account.pw_gid,
                "extra_groups": [],
                "cwd": "/",
            },
        )
    finally:
        os.close(opened)


def initialise(programs: Programs, data: Path, password: str) -> None:
    """Make the database cluster where there is none.

    Raises:
        ServiceError: initdb failed, or another major version made the data.
    """
    version = data / "PG_VERSION"
    if version.is_file():
        if (made_by := version.read_text().strip()) != programs.major:
            raise ServiceError(
                f"{data} was made by PostgreSQL {made_by}, {programs.folder} is {programs.major}: "
                f"install {made_by}, or convert it with pg_upgrade"
            )
        return
    # The password in a file that has no name: an argument would stand in the list of processes.
    with _data_folder(data) as (folder, options), tempfile.TemporaryFile() as file:
        file.write(password.encode() + b"\n")
        file.seek(0)
        if "user" in options:
            os.fchown(file.fileno(), options["user"], options["group"])
        handed = (*options.get("pass_fds", ()), file.fileno())
        done = subprocess.run(
            [
                *(str(programs.folder / "initdb"), "-D", folder, "-U", SUPERUSER),
                *("--auth=scram-sha-256", f"--pwfile=/proc/self/fd/{file.fileno()}"),
                *("--encoding=UTF8", "--locale=C", "--data-checksums"),
            ],
            capture_output=True,
            text=True,
            check=False,
            **(options | {"pass_fds": handed}),
        )
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise ServiceError(f"the database cannot be made in {data}: {said[-1].strip()}")


def start(root: Path, port: int, known: Secrets) -> Service:
    """Start the server (its data folder is made the first time) and wait until it answers.

    Raises:
        ServiceError: it is not installed or does not come up.
    """
    programs = find_programs()
    data = services_dir(root) / "postgres"
    initialise(programs, data, known.superuser)
    began = time.monotonic()
    while True:
        with _data_folder(data) as (folder, options):
            command = [
                *(str(programs.folder / "postgres"), "-D", folder, "-p", str(port)),
                # No Unix socket: its folder would have to be one that both accounts may write to.
                *("-h", LOOPBACK, "-k", "", "-N", str(MAX_CONNECTIONS)),
            ]
            url = f"postgresql://{LOOPBACK}:{port}"
            service = start_daemon(root, "postgres", url, command, {}, **options)
        problem = _wait(service, known)
        if problem is None:
            return service
        stop_service(service)
        # After kill -9 the server's processes take a moment to notice and to let go.
        if "shared memory" not in problem or time.monotonic() - began > LINGER_S:
            raise ServiceError(f"postgres did not start ({problem}); see {service.log}")
        time.sleep(0.5)


def _wait(service: Service, known: Secrets) -> str | None:
    """Wait until the server takes connections; otherwise what it said last."""
    process = psutil.Process(service.pid)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if answers(service, known):
            return None
        if not is_running(process):
            break
        time.sleep(0.1)
    lines = Path(service.log).read_text(errors="replace").splitlines()
    fatal = [line.partition("FATAL:")[2].strip() for line in lines if "FATAL:" in line]
    return (fatal or [*lines, "no answer"])[-1]


def answers(service: Service, known: Secrets) -> bool:
    """Whether the superuser can log in."""
    import psycopg

    try:
        _connect(service, known).close()
    except psycopg.OperationalError:
        return False
    return True


def _connect(service: Service, known: Secrets) -> Any:
    import psycopg

    return psycopg.connect(
        host=LOOPBACK,
        port=service.port,
        user=SUPERUSER,
        password=known.superuser,
        dbname="postgres",
        connect_timeout=3,
        autocommit=True,
    )


def create_databases(service: Service, known: Secrets) -> None:
    """Roles and databases of Prefect and MLflow, where they do not exist yet."""
    from psycopg import sql

    with _connect(service, known) as connection:
        roles = {row[0] for row in connection.execute("select rolname from pg_roles")}
        names = {row[0] for row in connection.execute("select datname from pg_database")}
        for role in sorted(set(DATABASES.values())):
            # Altered too, since secrets.json may be newer than the database (it was deleted, or
            # restored).
            verb = "alter" if role in roles else "create"
            connection.execute(
                sql.SQL(verb + " role {} login password {}").format(
                    sql.Identifier(role), sql.Literal(known.database_password(role))
                )
            )
        for database in sorted(set(DATABASES) - names):
            connection.execute(
                sql.SQL("create database {} owner {}").format(
                    sql.Identifier(database), sql.Identifier(DATABASES[database])
                )
            )
            # Otherwise every role may connect to every database.
            connection.execute(
                sql.SQL("revoke all on database {} from public").format(sql.Identifier(database))
            )
