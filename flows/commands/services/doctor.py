"""`ultraflux doctor`: what is missing or broken on this machine, and how to fix it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil

from components.files.install_hints import download_command, install_hint
from components.telemetry.wording import few
from flows.commands.command_line import print_json
from flows.commands.tables import table_of, terminal
from flows.records.provenance import locked_packages

Verdict = Literal["ok", "warning", "problem"]
MIN_DISK_GB, MIN_MEMORY_GB = 5.0, 8.0


_PARTS = {
    "autoencoder": ("vae/*",),
    "transformer": ("transformer/*",),
    "text_encoders": ("tokenizer*/*", "text_encoder*/*"),
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    topic: str
    verdict: Verdict
    text: str
    fix: str = ""


def examine(root: Path) -> list[Finding]:
    """Look at everything; never raises."""
    findings: list[Finding] = []
    checks = (
        _python,
        _machine,
        _packages,
        _programs,
        _project,
        _engine,
        _training,
        _photos,
        _weights,
        _services,
    )
    for check in checks:
        try:
            findings += list(check(root))
        except Exception as problem:
            findings.append(Finding(check.__name__.strip("_"), "problem", str(problem)))
    return findings


def print_findings(findings: list[Finding], *, as_json: bool) -> int:
    """Print a table, or one JSON object; returns the exit code: 1 where there is a problem."""
    if as_json:
        print_json({"findings": [asdict(finding) for finding in findings]})
    else:
        _print_table(findings)
    return int(any(finding.verdict == "problem" for finding in findings))


def _print_table(findings: list[Finding]) -> None:
    from rich.text import Text

    colours = {"ok": "green", "warning": "yellow", "problem": "red"}
    cells = ((Text.styled(f.verdict, colours[f.verdict]), f.topic, f.text, f.fix) for f in findings)
    terminal().print(table_of(("", "topic", "finding", "what to do"), cells))


def _python(_root: Path) -> Iterator[Finding]:
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding(
        "python", "ok" if good else "problem", version, "" if good else "use Python 3.11 to 3.13"
    )


def _machine(root: Path) -> Iterator[Finding]:
    disk_gb = shutil.disk_usage(root).free / 1e9
    memory_gb = psutil.virtual_memory().total / 1e9
    for topic, value, least in (
        ("free disk", disk_gb, MIN_DISK_GB),
        ("memory", memory_gb, MIN_MEMORY_GB),
    ):
        good = value >= least
        fix = "" if good else f"at least {least:.0f} GB for the embedded profile"
        yield Finding(topic, "ok" if good else "warning", f"{value:.0f} GB", fix)
    yield Finding("cores", "ok", str(os.cpu_count()))


def _packages(root: Path) -> Iterator[Finding]:
    wrong: list[str] = []
    lock = (root / "requirements.lock").read_text(encoding="utf-8")
    for name, version in locked_packages(lock).items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        if installed != version:
            wrong.append(f"{name} is {installed}, locked {version}")
    if wrong:
        yield Finding("packages", "problem", few(wrong, 4), "make setup")
    else:
        yield Finding("packages", "ok", "as locked")
    for module, extra in (("pyiqa", "iqa"), ("ultralytics", "people")):
        if importlib.util.find_spec(module) is None:
            yield Finding(
                "extras",
                "warning",
                f"{module} is not installed (optional)",
                install_hint(extra),
            )


def _engine(root: Path) -> Iterator[Finding]:
    from components.settings.schema import load_settings

    runtime = load_settings(root / "params.yaml").runtime
    if runtime.engine == "local":
        yield Finding("engine", "ok", f"corpus: {runtime.workers} worker processes here")
        return
    where = runtime.ray_address or "an instance on this machine"
    if importlib.util.find_spec("ray") is None:
        yield Finding("engine", "problem", "runtime.engine: ray", install_hint("ray"))
    else:
        yield Finding("engine", "ok", f"corpus: Ray, {where} (not contacted)")


def _training(root: Path) -> Iterator[Finding]:
    from components.settings.schema import load_settings

    settings = load_settings(root / "params.yaml")
    for name in ("dit_stage1", "dit_stage2"):
        stage = getattr(settings, name)
        needs = (
            ("adapter", stage.adapter is not None, "peft", None),
            ("optimizer: adamw_8bit", stage.optimizer == "adamw_8bit", "bitsandbytes", "gpu"),
        )
        for setting, used, module, extra in needs:
            if used and importlib.util.find_spec(module) is None:
                text = f"{name}.{setting} needs {module}, which is not installed"
                yield Finding("training", "problem", text, install_hint(extra))


def _programs(_root: Path) -> Iterator[Finding]:
    for name in ("git", "dvc"):
        found = shutil.which(name)
        fix = "" if found else f"install {name}"
        yield Finding(name, "ok" if found else "problem", found or "not in PATH", fix)
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            yield Finding("gpu", "ok", line)
    else:
        yield Finding("gpu", "warning", "none: only the embedded profile runs here")


def _project(root: Path) -> Iterator[Finding]:
    from components.settings.schema import SettingsError, load_settings
    from flows.pipeline.preflight import PipelineRefused, preflight
    from flows.versioning.graph import GraphError, stage_graph

    checks: tuple[tuple[str, Callable[[], object]], ...] = (
        ("params.yaml", lambda: load_settings(root / "params.yaml")),
        ("dvc.yaml", lambda: stage_graph(root)),
        ("folders", lambda: preflight(root)),
    )
    for topic, check in checks:
        try:
            check()
        except (SettingsError, GraphError, PipelineRefused) as problem:
            yield Finding(topic, "problem", str(problem))
        else:
            yield Finding(topic, "ok", "valid" if topic != "folders" else "writable")


def _photos(root: Path) -> Iterator[Finding]:
    from components.corpus.listing.source_files import photographs
    from components.settings.schema import load_settings

    ingest = load_settings(root / "params.yaml").ingest
    folder = root / ingest.source
    if ingest.kind != "folder":
        detail = f"{ingest.kind} from {ingest.source}"
        if folder.exists():
            yield Finding("photographs", "ok", detail)
        else:
            yield Finding("photographs", "problem", detail, "set ingest.source in params.yaml")
        return
    found = photographs(folder, ingest.extensions, recursive=ingest.recursive)
    count = sum(1 for _ in found)
    fix = "" if count else "set ingest.source in params.yaml to a folder of photographs"
    yield Finding("photographs", "ok" if count else "problem", f"{count} in {ingest.source}", fix)


def _weights(root: Path) -> Iterator[Finding]:
    from components.models.backbones import BACKBONES
    from components.settings.schema import load_settings

    models = load_settings(root / "params.yaml").models
    for name in ("autoencoder", "transformer", "text_encoders"):
        folder = getattr(models, name).pretrained
        if folder is None:
            yield Finding("weights", "ok", f"{name}: tiny random network (no weights needed)")
        elif (root / folder).is_dir():
            yield Finding("weights", "ok", f"{name}: {folder}")
        else:
            # The autoencoder is Flux's for every backbone.
            backbone = "flux" if name == "autoencoder" else models.transformer.backbone
            # The setting names the part's folder, except for text encoders: there are several.
            into = folder if name == "text_encoders" else str(Path(folder).parent)
            fix = download_command(BACKBONES[backbone].repository, into, include=_PARTS[name])
            yield Finding("weights", "problem", f"{name}: {folder} is missing", fix)


def _services(root: Path) -> Iterator[Finding]:
    from flows.services.servers import DEFAULT_PORTS, port_is_free, running_services

    running = running_services(root)
    for service in running:
        yield Finding("services", "ok", f"{service.name} at {service.url}")
    if not running:
        yield Finding("services", "ok", "not running (start: make services)")
    taken = {name: port for name, port in DEFAULT_PORTS.items() if not port_is_free(port)}
    if taken and not running:
        ports = ", ".join(map(str, taken.values()))
        options = " ".join(f"--{name}-port N" for name in taken)
        yield Finding("ports", "warning", f"{ports} taken", f"ultraflux up {options}")
