"""The one place where process-wide switches of third-party tools are set.

Every entry point calls `prepare` before heavy imports; child processes inherit the result.
Values that the user has set already are left alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import socket
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

SWITCHES = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLI_PROMPT": "false",
    # Prefect's own 180 s would let conf/automations/heartbeat_lost.yaml call healthy runs lost:
    # pipelines in a terminal, which no work pool gives an environment.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # A bar for each model that is loaded, in the middle of a pipeline's lines.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_MININTERVAL": "0.5",
    # The uploader tries again by itself; MLflow's own seven tries would hold up a run's end by
    # minutes when the server is away.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "PGCONNECT_TIMEOUT": "20",
}

GIT_PLACES = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_IMPLICIT_WORK_TREE",
    "GIT_COMMON_DIR",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_QUARANTINE_PATH",
    "GIT_SHALLOW_FILE",
    "GIT_GRAFT_FILE",
    "GIT_REPLACE_REF_BASE",
    "GIT_NAMESPACE",
    "GIT_PREFIX",
    "GIT_INTERNAL_SUPER_PREFIX",
    "GIT_CONFIG",
)
"""What Git puts into the environment of its hooks to say which repository is meant
(`git rev-parse --local-env-vars`): a program that starts there would read and prune that one. Not
GIT_CONFIG_COUNT and GIT_CONFIG_PARAMETERS, which hold settings of a person such as
`safe.directory`."""


PROJECT_FILES = ("dvc.yaml", "params.yaml")


def project_root(start: Path | None = None, *, files: Sequence[str] = PROJECT_FILES) -> Path:
    """The nearest folder at or above `start` (default: here) with `files`.

    Raises:
        FileNotFoundError: none found; the message says what to do.
    """
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if all((folder / name).is_file() for name in files):
            return folder
    raise FileNotFoundError(
        f"no UltraFlux project at or above {here} ({' and '.join(files)}): change into a clone, or "
        "write a params.yaml that is missing there: `ultraflux config compose`"
    )


CODE = Path(__file__).resolve().parents[1]
"""The folder that this code was installed from, a clone where it was installed to be edited."""
PROJECT = "ULTRAFLUX_PROJECT"
"""Names what this clone owns on a Prefect server that others use too."""


class ProjectNameRefused(ValueError):
    """ULTRAFLUX_PROJECT cannot be part of a name on the server; one line."""


_PROJECT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def project_name(root: Path) -> str:
    """What a clone's pools, deployments, automations and flow runs are named and tagged after.

    `ULTRAFLUX_PROJECT`, which clones that work together share; without it a name of this clone's
    own (of its machine and folder), so that nobody takes what is somebody else's.

    Raises:
        ProjectNameRefused: ULTRAFLUX_PROJECT cannot be part of a name on the server.
    """
    chosen = os.environ.get(PROJECT)
    if chosen is None:
        place = f"{socket.gethostname()}:{root.resolve()}"
        return f"ultraflux-{hashlib.sha256(os.fsencode(place)).hexdigest()[:8]}"
    if not _PROJECT_NAME.fullmatch(chosen):
        raise ProjectNameRefused(
            f"{PROJECT}={chosen!r}: use 1 to 63 letters, digits, dots, dashes or underscores, and "
            "begin with a letter or digit"
        )
    return chosen


def pool_name(project: str, pool: str) -> str:
    """Name of a work pool on the server, and of the deployment of the flow `stage` for it.

    Args:
        project: `project_name`.
        pool: pipelines, cpu or gpu.
    """
    return f"{project}-{pool}"


_AS_ERROR = re.compile(r"^\s*e[a-z]*")
"""The action of a part of PYTHONWARNINGS, which may be cut short."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _reach_loopback() -> None:
    """No proxy for this machine: none can reach its loopback, where servers and ranks talk.

    Both spellings, since libraries read one or the other; what the user has set stays.
    """
    names = ("no_proxy", "NO_PROXY")
    given = [part.strip() for name in names for part in os.environ.get(name, "").split(",")]
    hosts = dict.fromkeys([*(part for part in given if part), *LOOPBACK])
    os.environ.update(dict.fromkeys(names, ",".join(hosts)))


def _show_warnings() -> None:
    """Warnings that PYTHONWARNINGS makes errors are shown here and below, and end nothing.

    They are libraries' words about each other, and of those that a command imports some always has
    one.
    """
    parts = os.environ.get("PYTHONWARNINGS", "").split(",")
    shown = [_AS_ERROR.sub("default", part) for part in parts]
    if shown == parts:
        return
    os.environ["PYTHONWARNINGS"] = ",".join(shown)
    for action, message, category, module, line in reversed(list(warnings.filters)):
        if action == "error" and isinstance(category, type):
            texts = [getattr(pattern, "pattern", "") for pattern in (message, module)]
            warnings.filterwarnings("default", texts[0], category, texts[1], line)


COMPILED = "runs/compiled"
"""Where the stages of a clone keep what torch's compiler makes."""


_REMARKS = (
    "torch.utils._pytree",
    "bitsandbytes.backends.cpu.ops",
    "diffusers.quantizers.torchao.torchao_quantizer",
)
"""Loggers that remark on each other's versions whenever diffusers is imported beside the extra
`gpu`: four lines before the one that a person looks for. Errors of theirs are shown."""


def _is_more_than_a_remark(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def prepare(
    *, offline: bool = False, torch_threads: int | None = None, root: Path | None = None
) -> None:
    """Switch telemetry off, keep this environment's programs first in PATH, the loopback direct.

    Git finds the repository by the folder that it is asked in, and by nothing else.

    Args:
        offline: forbid the Hugging Face hub, so that a missing weight fails at once.
        torch_threads: intra-op threads for processes that start from here.
        root: of a clone in which a stage runs; torch's compiler then leaves its files there, and
            not in the machine's temporary folder.
    """
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    for name in GIT_PLACES:
        os.environ.pop(name, None)
    for name in _REMARKS:
        # Once, however often this is called: the same function is the same filter.
        logging.getLogger(name).addFilter(_is_more_than_a_remark)
    _reach_loopback()
    _show_warnings()
    if offline:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if torch_threads is not None:
        # Set, not defaulted: the number of threads decides the order of sums, and with it the
        # weights.
        os.environ["OMP_NUM_THREADS"] = str(torch_threads)
    if root is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(root / COMPILED))
    programs = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    # `dvc` in a pipeline is to be this environment's, also where nobody has activated it.
    if path.split(os.pathsep)[0] != programs:
        os.environ["PATH"] = f"{programs}{os.pathsep}{path}"
