"""The one place where process-wide switches of third-party tools are set.

Every entry point calls `prepare` before heavy imports; child processes inherit the result.
Values that the user has set already are left alone.
"""

from __future__ import annotations

import os
import sys
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
}


def project_root(start: Path | None = None) -> Path:
    """The nearest folder at or above `start` (default: here) with dvc.yaml and params.yaml.

    Raises:
        FileNotFoundError: none found; the message says what to do.
    """
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file() and (folder / "params.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"no UltraFlux project at or above {here} (dvc.yaml and params.yaml): change into a clone"
    )


def prepare(*, offline: bool = False, torch_threads: int | None = None) -> None:
    """Switch telemetry off, keep this environment's programs first in PATH.

    Args:
        offline: forbid the Hugging Face hub, so that a missing weight fails at once.
        torch_threads: intra-op threads for processes that start from here.
    """
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    if offline:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if torch_threads is not None:
        # Set, not defaulted: the number of threads decides the order of sums, and with it the
        # weights.
        os.environ["OMP_NUM_THREADS"] = str(torch_threads)
    programs = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    # `dvc` in a pipeline is to be this environment's, also where nobody has activated it.
    if path.split(os.pathsep)[0] != programs:
        os.environ["PATH"] = f"{programs}{os.pathsep}{path}"
