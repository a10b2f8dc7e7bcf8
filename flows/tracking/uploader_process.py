"""The uploader beside a run, as a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DRAIN_TIMEOUT_S = 120.0
NOT_SENT = "Not everything is in MLflow (runs/logs/tracking.log): send it later, `ultraflux sync`"
"""After a drain that did not send everything; the log says whether records or MLflow are why."""


class UploaderProcess:
    """The uploader as a child; it ends by itself when this process does."""

    def __init__(self, root: Path) -> None:
        """Start it (low priority: training comes first)."""
        log = root / "runs" / "logs" / "tracking.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                ["nice", "-n", "5", sys.executable, "-m", "flows.tracking.uploader", str(root)],
                cwd=root,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def drain(self) -> bool:
        """Let it upload the rest; False: not all of it was sent."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            return self._process.wait(DRAIN_TIMEOUT_S) == 0
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return False
