"""The pipeline over two clones with Prefect workers, one stage killed: the bytes of one clone?

    python benchmarks/two_machines.py [--remote folder|s3] [--folder KEEP]

Prints the transcript of docs/two_machines.md: three clones of HEAD (six of the bundled photographs,
few steps), a Prefect server beside the pipeline's, a worker per pool in each of the other two, a
shared DVC remote (a folder, or an S3 server on the loopback), `kill -9` of the flow run that trains
the autoencoder, then the comparison with an undisturbed run in a fourth clone. Ends with an error
where anything differs.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml
from small_project import LONG_ENOUGH_TO_KILL, PHOTOS, change_settings, keep_photos

from flows.services.servers import free_port
from flows.services.workers import stop_workers
from flows.tracking.tier import services_dir

ROOT = Path(__file__).resolve().parents[1]
VICTIM_STAGE = "vae"
WORKERS = ("worker-a", "worker-b")
AWS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}


class Transcript:
    """Prints what is typed and what is answered, with the temporary folder shortened."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self._folder = folder
        self.env = env

    def line(self, text: str) -> None:
        """Print a line."""
        print(text.replace(str(self._folder), "/srv"), flush=True)

    def typed(self, clone: str, *command: str) -> None:
        """Print a command at the prompt of a clone."""
        self.line(f"{clone}$ {' '.join(command)}")

    def environment(self, clone: str) -> dict[str, str]:
        """That of a machine which has `clone` alone: its code, whatever is installed here."""
        return self.env | {"PYTHONPATH": str(self._folder / clone), "PYTHONUNBUFFERED": "1"}

    def run(self, clone: str, *command: str, quiet: bool = False) -> None:
        """Run a command in a clone; leave with its output where it fails."""
        self.typed(clone, *command)
        done = subprocess.run(
            command,
            cwd=self._folder / clone,
            env=self.environment(clone),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        if done.stdout.strip() and not quiet:
            self.line(done.stdout.rstrip())


def make_origin(folder: Path) -> None:
    """A small version of the project that every clone comes from."""
    origin = folder / "origin"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(origin)], check=True)
    keep_photos(origin, PHOTOS)
    change_settings(origin, LONG_ENOUGH_TO_KILL)
    who = ["-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost"]
    subprocess.run(["git", *who, "commit", "-qam", "Small settings"], cwd=origin, check=True)


@contextmanager
def s3_server(folder: Path, env: dict[str, str]) -> Iterator[str]:
    """Address of an S3 server with a bucket `ultraflux`."""
    port = free_port()
    with (folder / "s3.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=log,
            stderr=log,
            env=env,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=url,
            aws_access_key_id=AWS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=AWS["AWS_SECRET_ACCESS_KEY"],
            region_name=AWS["AWS_DEFAULT_REGION"],
        )
        client.create_bucket(Bucket="ultraflux")
        yield url
    finally:
        server.terminate()
        server.wait()


def training_run(transcript: Transcript, folder: Path) -> tuple[str, psutil.Process] | None:
    """Clone and process of the flow run to be killed, once its checkpoint is on the remote."""
    for pointer in folder.glob(f"worker-*/runs/{VICTIM_STAGE}/*/checkpoints/latest"):
        clone = pointer.parents[4]
        kept = subprocess.run(
            ["ultraflux", "remote", "--state"],
            cwd=folder / "pipeline",
            env=transcript.environment("pipeline"),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        if not re.search(rf"^{VICTIM_STAGE}/.*step-", kept, re.MULTILINE):
            continue
        for process in psutil.process_iter(["cmdline"]):
            try:
                command = process.info["cmdline"] or []
                if command[-3:] != ["stage", "run", VICTIM_STAGE] or process.cwd() != str(clone):
                    continue
                for above in process.parents():
                    if "prefect.engine" in " ".join(above.cmdline()):
                        return clone.name, above
            except psutil.Error:
                continue
    return None


@contextmanager
def servers_and_workers(transcript: Transcript, folder: Path) -> Iterator[None]:
    """A server beside the pipeline's clone, and workers in the others that take a stage at a time.

    On machines of their own the workers end with `ultraflux down` there; here that would take the
    server of this machine for theirs, so their processes are ended.
    """
    ports = ["--prefect-port", str(free_port()), "--mlflow-port", str(free_port())]
    transcript.env["PREFECT_API_URL"] = f"http://127.0.0.1:{ports[1]}/api"
    try:
        transcript.run("pipeline", "ultraflux", "up", *ports, quiet=True)
        transcript.line("# on each machine: set -a; . clients.env (address, logins, project)")
        clients = (services_dir(folder / "pipeline") / "clients.env").read_text().split()
        said = dict(line.split("=", 1) for line in clients)
        # Records come with the replies here, not over MLflow's server.
        transcript.env |= {name: said[name] for name in said if not name.startswith("MLFLOW_")}
        for name in WORKERS:
            transcript.run(name, "ultraflux", "deploy", "--workers", "--limit", "1", quiet=True)
        yield
    finally:
        for name in WORKERS:
            stop_workers(folder / name)
        transcript.run("pipeline", "ultraflux", "down", quiet=True)


def run_and_kill(transcript: Transcript, folder: Path) -> None:
    """The pipeline over both workers; the flow run that trains the autoencoder dies once."""
    command = ["ultraflux", "run", "--engine", "pools", "--remote-data"]
    transcript.typed("pipeline", *command)
    run = subprocess.Popen(
        command,
        cwd=folder / "pipeline",
        env=transcript.environment("pipeline"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.stdout is not None
    os.set_blocking(run.stdout.fileno(), False)
    killed = False
    while True:
        ended = run.poll() is not None
        for line in iter(run.stdout.readline, ""):
            transcript.line(line.rstrip())
        if ended:
            break
        if not killed and (victim := training_run(transcript, folder)) is not None:
            clone, process = victim
            transcript.typed(clone, "kill", "-9", f"{process.pid}   # trains the autoencoder")
            process.kill()
            killed = True
        time.sleep(0.1)
    if run.returncode or not killed:
        sys.exit(f"the run ended with {run.returncode}; a stage was killed: {killed}")


def outputs(clone: Path) -> dict[str, str]:
    """DVC hash by output path."""
    stages: dict[str, Any] = yaml.safe_load((clone / "dvc.lock").read_text())["stages"]
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]}


def differing_files(one: Path, two: Path) -> list[str]:
    """Files of outputs whose bytes differ, or that only `one` has."""
    different = []
    for name in outputs(one):
        paths = [one / name] if (one / name).is_file() else sorted((one / name).rglob("*"))
        for path in (path for path in paths if path.is_file()):
            other = two / path.relative_to(one)
            if not other.is_file() or other.read_bytes() != path.read_bytes():
                different.append(str(path.relative_to(one)))
    return different


def compare(transcript: Transcript, folder: Path, remote_seconds: float) -> None:
    """The same settings in one clone, undisturbed."""
    shared = {
        *("ULTRAFLUX_DVC_REMOTE", "ULTRAFLUX_PROJECT"),
        *("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"),
    }
    env = {key: value for key, value in transcript.env.items() if key not in shared}
    single = Transcript(folder, env)
    started = time.monotonic()
    single.run("single", "ultraflux", "run", quiet=True)
    seconds = time.monotonic() - started
    if outputs(folder / "single") != outputs(folder / "pipeline"):
        sys.exit("dvc.lock differs")
    if different := differing_files(folder / "single", folder / "pipeline"):
        sys.exit(f"different bytes: {', '.join(different)}")
    count = len(outputs(folder / "single"))
    transcript.line(
        f"# {count} outputs, every file the same bytes; two clones and one kill "
        f"{remote_seconds:.0f} s, one clone {seconds:.0f} s (all on one machine)"
    )


def main() -> None:
    """Clone, run, kill, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--remote", choices=["folder", "s3"], default="folder")
    parser.add_argument("--folder", type=Path, help="work here and keep it (default: temporary)")
    options = parser.parse_args()
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    left_out = {"PYTHONDONTWRITEBYTECODE", "ULTRAFLUX_DVC_REMOTE"}
    left_out |= {"MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_API_AUTH_STRING"}
    env = {k: v for k, v in os.environ.items() if k not in left_out} | {"PATH": programs}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        memory_gib = psutil.virtual_memory().total / 2**30
        print(f"# {platform.machine()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB")
        make_origin(folder)
        if options.remote == "s3":
            # No configuration of this user's, no network: a server on the loopback.
            for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
                (folder / name).touch()
                env[name] = str(folder / name)
            env |= AWS
            with s3_server(folder, env) as url:
                env |= {"ULTRAFLUX_DVC_REMOTE": "s3://ultraflux/data", "AWS_ENDPOINT_URL": url}
                walk(Transcript(folder, env), folder)
        else:
            (folder / "share").mkdir()
            env["ULTRAFLUX_DVC_REMOTE"] = str(folder / "share")
            walk(Transcript(folder, env), folder)


def walk(transcript: Transcript, folder: Path) -> None:
    """Everything between set-up and tear-down."""
    for name in ("pipeline", *WORKERS, "single"):
        subprocess.run(["git", "clone", "-q", "origin", name], cwd=folder, check=True)
    for name in ("ULTRAFLUX_DVC_REMOTE", "AWS_ENDPOINT_URL"):
        if name in transcript.env:
            transcript.typed("*", "export", f"{name}={transcript.env[name]}")
    with servers_and_workers(transcript, folder):
        started = time.monotonic()
        run_and_kill(transcript, folder)
        seconds = time.monotonic() - started
    transcript.run("pipeline", "dvc", "pull", "-q")
    transcript.run("pipeline", "dvc", "status")
    compare(transcript, folder, seconds)


if __name__ == "__main__":
    main()
