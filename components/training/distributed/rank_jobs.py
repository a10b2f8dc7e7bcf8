"""A training job in as many processes as its settings want: this one, or ranks on every node.

A job is everything that decides a run, as one frozen model that travels to the ranks as JSON. A
worker module has the job's type, the function that does one process's share, and `rank_main` as
its entry point.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from components.files.holder_locks import held_alone
from components.files.whole_files import write_text
from components.settings.bad_input import BadInput
from components.settings.runtime import RuntimeSettings
from components.training.distributed.interruption import TrainingInterrupted, forget_interruption
from components.training.distributed.ranks import exit_with_parent
from components.training.distributed.supervision import launch, reporting_failures

JOB_FILE = "job.json"
LOCK_FILE = "lock"
_JOIN = "--join"
"""Of a worker's command line: launch the processes of a further node."""


class StateInUse(BadInput):
    """Two processes would write into one training state; one line."""


class RankJob(Protocol):
    """What is needed of a job (a pydantic model)."""

    @property
    def runtime(self) -> RuntimeSettings:
        """Processes, nodes, restarts, time limit."""

    @property
    def state_dir(self) -> Path:
        """Where the job's file, logs and checkpoints are."""

    def model_dump_json(self, *, indent: int) -> str:
        """The whole job."""


J = TypeVar("J", bound=RankJob)


def run_in_ranks(job: J, worker: str, share: Callable[[J], None]) -> None:
    """Do `job` with `job.runtime.processes` processes on this node.

    Args:
        job: what to do.
        worker: module whose entry point is `rank_main`.
        share: one process's part; it is called right here where one process is all there is, so
            that the smallest run needs no launcher, no port and no second import of torch.

    Raises:
        StateInUse: another process trains in the job's state folder.
        TrainingInterrupted: asked to stop; the state is saved.
        TrainingRefused: (several processes) a rank failed in a way that a retry would repeat.
        TrainingFailed: (several processes) a rank failed; names it, its last words and the logs.
    """
    job.state_dir.mkdir(parents=True, exist_ok=True)
    with state_lock(job.state_dir):
        forget_interruption(job.state_dir)
        if job.runtime.processes * job.runtime.nodes == 1:
            share(job)
            return
        path = job.state_dir / JOB_FILE
        # A file and no command line: a job may list every photograph of a slice.
        write_text(path, job.model_dump_json(indent=1))
        launch(worker, [str(path.resolve())], job.runtime, job.state_dir)


@contextmanager
def state_lock(state_dir: Path) -> Iterator[None]:
    """Hold a state's folder; the lock is the kernel's and ends with its holder.

    Raises:
        StateInUse: another process, of whatever origin, trains in this folder.
    """

    def refusal(holder: str) -> StateInUse:
        return StateInUse(
            f"another process ({holder}) trains in {state_dir}; wait for its end or stop it"
        )

    name = f"{os.getpid()} on {socket.gethostname()}"
    with held_alone(state_dir / LOCK_FILE, name, refusal):
        yield


def rank_main(
    kind: Any, worker: str, share: Callable[[Any], None], lasting: tuple[type[BaseException], ...]
) -> None:
    """Entry point of a launched rank; with `--join`, launch the processes of a further node.

    Args:
        kind: the job's pydantic model.
        worker: the module itself.
        share: one process's part of the job.
        lasting: failures that another attempt would only repeat.
    """
    # Before anything that takes long: from here on no rank outlives its launcher.
    exit_with_parent()
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    # Not strict: in JSON a path is a string and a tuple a list.
    job = kind.model_validate_json(text, strict=False)
    # Outside `reporting_failures`: this process is a launcher and has no rank to report for.
    if _JOIN in sys.argv:
        launch(worker, sys.argv[1:2], job.runtime, job.state_dir, joins=True)
        return
    with reporting_failures(lasting):
        try:
            share(job)
        except TrainingInterrupted as stop:
            # A good end for torchrun, which would start the ranks again; the launcher reads what
            # the state's folder says.
            print(stop, file=sys.stderr, flush=True)
