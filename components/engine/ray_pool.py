"""The corpus engine across machines: the same functions and rows, in actors of Ray Core.

Every actor keeps one worker process of `worker_pool` for as long as the run lasts. The process
computes the items, so time, memory and crashes are dealt with (and worded) exactly as on one
machine, and a network is loaded once per actor. Ray only carries batches of items there and back;
a row never depends on the batch that it travelled in.

An actor that is lost (its machine went away, the memory killer took it) takes up to two batches
with it. Nobody knows which of their items is to blame, if any, so they are sent again one by one,
each to an actor that has nothing else; only an item that is alone with a lost actor pays with an
attempt. Ray itself never repeats anything: `max_restarts` and `max_task_retries` are 0.

`ray` (extra `ray`) is imported when a run needs it and not before.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import pickle
import platform
import secrets
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from components.engine.ordered_pool import (
    EngineLimits,
    Failure,
    Item,
    OrderedPool,
    RayOptions,
    WorkersDoNotStart,
)
from components.engine.worker_pool import WorkerPool
from components.files.install_hints import install_hint

_BATCHES_PER_ACTOR = 2
"""One that is computed and one that waits, so that no actor idles while results travel."""
_START_ATTEMPTS = 3
_START_TIMEOUT_S = 600.0
"""Longest wait for the first actor: an autoscaled machine has this long to appear."""
_SLACK_S = 300.0
"""What a batch may take beside its items: starting the worker process, loading a network."""
_CLOSE_TIMEOUT_S = 5.0
_KNOCK_TIMEOUT_S = 10.0
_OBJECT_STORE_BYTES = 256 * 2**20
"""Of an own instance; batches of derivatives pass through it, nothing stays."""
_BYTES_DEPEND_ON = ("numpy", "opencv-python-headless", "pillow", "pyarrow", "simplejpeg")


class EngineUnavailable(ValueError):
    """Ray cannot be used as the settings say; one line: what, and how to fix it."""


def installation_digest() -> str:
    """Hash of what rows depend on beside settings: Python, the decoders, the code of components."""
    digest = hashlib.sha256(platform.python_version().encode())
    for name in _BYTES_DEPEND_ON:
        digest.update(f"{name}=={importlib.metadata.version(name)}\n".encode())
    root = Path(__file__).resolve().parents[1]
    for path in sorted(root.rglob("*.py")):
        # Relative paths: two machines may keep the same commit in different folders.
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _prepare_own_instance() -> None:
    """Keep an instance of our own on the loopback and under a token that nobody else has."""
    # The loopback is no protection by itself: other accounts of the machine reach it too.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Read when ray is imported. With it Ray listens on the address that it is given; without it
    # 127.0.0.1 is replaced by the machine's own address and every port is open to the network.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def _start_own_instance(ray: Any, cpus: int) -> None:
    ray.init(
        # Never a cluster that RAY_ADDRESS or an earlier `ray start` offers: this one is ours.
        address="local",
        num_cpus=cpus,
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        _node_ip_address="127.0.0.1",
    )


def _knock(address: str) -> None:
    """Fail at once where nobody listens: Ray itself tries for minutes.

    Raises:
        OSError: nothing answers there.
    """
    # Ray finds the address of "auto" itself; there is nothing to knock at.
    if address != "auto":
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=_KNOCK_TIMEOUT_S).close()


def connect(options: RayOptions) -> Any:
    """Import ray and connect it, once per process; it disconnects when the process ends.

    Returns:
        the module.

    Raises:
        EngineUnavailable: the package is not installed, or no cluster answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if options.address is None:
        _prepare_own_instance()
    try:
        import ray
    except ImportError as problem:
        raise EngineUnavailable(
            f"runtime.engine is 'ray', but the package ray cannot be imported ({problem}): "
            f"{install_hint('ray')}, or set runtime.engine to local"
        ) from None
    # A process has one connection; several pools of one run share it.
    if ray.is_initialized():
        return ray
    if options.address is None:
        _start_own_instance(ray, options.local_cpus)
        return ray
    try:
        _knock(options.address)
        ray.init(address=options.address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as problem:
        reason = " ".join(str(problem).split()).rstrip(".")
        raise EngineUnavailable(
            f"runtime.ray_address: no connection to a Ray cluster at {options.address} ({reason}); "
            "start one with `ray start --head`, or set it to null"
        ) from None
    return ray


def actor_count(resources: dict[str, float], options: RayOptions) -> int:
    """How many actors to ask for: what the settings say, or as many as there is room for.

    Args:
        resources: of the whole cluster, as `ray.cluster_resources` names them.
        options: one CPU and `gpus_per_actor` GPUs each.

    Raises:
        EngineUnavailable: not one fits.
    """
    room = int(resources.get("CPU", 0))
    if options.gpus_per_actor > 0:
        # A sum of shares such as 0.1 may end a hair below a whole number.
        room = min(room, int(resources.get("GPU", 0) / options.gpus_per_actor + 1e-9))
    if room == 0:
        raise EngineUnavailable(
            f"runtime.gpus_per_actor: an actor needs 1 CPU and {options.gpus_per_actor:g} GPU, the "
            f"Ray cluster has {resources.get('CPU', 0):g} and {resources.get('GPU', 0):g} in all"
        )
    return options.actors or room


class _PickledCall:
    """A function of pickled payloads, so that only the worker process imports what it needs."""

    def __init__(self, pickled: bytes) -> None:
        self._pickled = pickled

    # In the worker process, at first use: the actor never imports what the function needs.
    @cached_property
    def _function(self) -> Callable[[Any], Any]:
        function: Callable[[Any], Any] = pickle.loads(self._pickled)
        return function

    def prepare_worker(self) -> None:
        """Import the function, then whatever it wants prepared."""
        getattr(self._function, "prepare_worker", lambda: None)()

    def __call__(self, payload: bytes) -> Any:
        return self._function(pickle.loads(payload))


class _Host:
    """Body of an actor: one worker process that outlives its batches."""

    def __init__(self, pickled: bytes, limits: EngineLimits, search_path: list[str]) -> None:
        # Ray starts its processes elsewhere; a spawned process takes its search path from this one.
        sys.path += [folder for folder in search_path if folder not in sys.path]
        # A spawned process imports the main module of its parent: here Ray's own script, and with
        # it all of Ray.
        sys.modules["__main__"].__file__ = None
        # The actor is the unit of parallelism: Ray has counted one CPU for it.
        limits = replace(limits, workers=1)
        self._pool = WorkerPool(_PickledCall(pickled), limits, keep_workers=True)

    def installation(self) -> str:
        return installation_digest()

    def run(self, payloads: list[bytes]) -> list[Any]:
        """A row or a `Failure` for each."""
        return list(self._pool.map(payloads))

    def close(self) -> None:
        self._pool.close()


@dataclass
class _Actor:
    """The driver's view of one actor."""

    handle: Any
    starting: Any
    """Reference of its first answer; None: it has given it."""
    batches: deque[tuple[Any, list[Item]]] = field(default_factory=deque)
    """References of results and their items, in the order in which they are computed."""
    deadline: float = float("inf")

    @property
    def head(self) -> Any:
        """Reference of what it will answer next; None: it has nothing to do."""
        if self.starting is not None:
            return self.starting
        return self.batches[0][0] if self.batches else None

    def takes(self, item: Item) -> bool:
        """Whether a batch that begins with `item` may be sent now."""
        if self.starting is not None:
            return False
        # A suspect waits for an empty actor and nothing joins it: if it is lost there, it alone is
        # to blame.
        if item.is_suspect:
            return not self.batches
        has_suspect = any(one.is_suspect for _, items in self.batches for one in items)
        return not has_suspect and len(self.batches) < _BATCHES_PER_ACTOR


def _pickled(function: Callable[[Any], Any]) -> bytes:
    """By name, as every machine will import it.

    Raises:
        EngineUnavailable: it stands in the script that runs, which has no name elsewhere.
    """
    inner = function.func if isinstance(function, partial) else function
    if inner.__module__ == "__main__":
        raise EngineUnavailable(
            f"runtime.engine is 'ray', which cannot import {inner.__name__} from a script: move it "
            "to a module"
        )
    return pickle.dumps(function)


class RayPool(OrderedPool):
    """Replaceable actors for one function."""

    def __init__(
        self, function: Callable[[Any], Any], limits: EngineLimits, options: RayOptions
    ) -> None:
        """Connect; actors start when there are items.

        Args:
            function: module-level, importable under the same name on every machine.
            limits: what one item may cost.
            options: where actors run.

        Raises:
            EngineUnavailable: see `connect`, `actor_count`; or a function of a script.
        """
        super().__init__(limits)
        arguments = (_pickled(function), limits, list(sys.path))
        self._batch_items = options.batch_items
        self._ray = connect(options)
        self._wanted = actor_count(self._ray.cluster_resources(), options)
        actor_class = self._ray.remote(_Host).options(
            num_cpus=1,
            num_gpus=options.gpus_per_actor,
            # Attempts are counted here. An item that kills its actor would kill each restarted one.
            max_restarts=0,
            max_task_retries=0,
            # Over machines first: Ray's default fills one before it takes the next.
            scheduling_strategy="SPREAD",
        )
        self._start: Callable[[], Any] = lambda: actor_class.remote(*arguments)
        # Of this machine; every actor has to answer with the same before it gets an item.
        self._installation = installation_digest()
        self._actors: list[_Actor] = []
        self._failed_starts = 0
        self._first_start_by = float("inf")

    def _window(self) -> int:
        # Twice what the actors hold, so that a slow item at the front leaves them work.
        return 2 * self._wanted * _BATCHES_PER_ACTOR * self._batch_items

    def _step(self, queue: deque[Item], done: dict[int, Any], open_items: int) -> None:
        # Also when all of them were lost: then the cluster has to show again that it has room.
        if not self._actors:
            self._first_start_by = time.monotonic() + _START_TIMEOUT_S
        while len(self._actors) < min(self._wanted, open_items):
            handle = self._start()
            self._actors.append(_Actor(handle, starting=handle.installation.remote()))
        self._send(queue)
        # Heads alone: an actor computes in order, so what is behind cannot be ready first.
        waiting = {actor.head: actor for actor in self._actors if actor.head is not None}
        until = min(self._first_start_by, *(actor.deadline for actor in self._actors))
        pause = None if until == float("inf") else max(0.0, until - time.monotonic())
        answered, _ = self._ray.wait(list(waiting), timeout=pause)
        for reference in answered:
            self._settle(waiting[reference], reference, queue, done)
        if not answered:
            self._settle_late(queue, done)

    def _send(self, queue: deque[Item]) -> None:
        """Fill actors evenly, those with less to do first."""
        # Smaller batches towards the end, so that the last items keep every actor busy.
        share = len(queue) // (_BATCHES_PER_ACTOR * len(self._actors))
        share = max(1, min(self._batch_items, share))
        while queue:
            free = [actor for actor in self._actors if actor.takes(queue[0])]
            if not free:
                return
            actor = min(free, key=lambda one: len(one.batches))
            batch = [queue.popleft()]
            if not batch[0].is_suspect:
                while queue and not queue[0].is_suspect and len(batch) < share:
                    batch.append(queue.popleft())
            payloads = [pickle.dumps(item.payload) for item in batch]
            actor.batches.append((actor.handle.run.remote(payloads), batch))
            if len(actor.batches) == 1:
                self._expect(actor)

    def _expect(self, actor: _Actor) -> None:
        """Set the time by which its next answer must be there."""
        actor.deadline = float("inf")
        if actor.batches:
            # The worker process inside enforces the limits; this is for a machine that fell silent,
            # so it allows what the worst batch may take.
            attempts = len(actor.batches[0][1]) * (self._limits.retries + 1)
            actor.deadline = time.monotonic() + _SLACK_S + attempts * self._limits.timeout_s

    def _settle(
        self, actor: _Actor, reference: Any, queue: deque[Item], done: dict[int, Any]
    ) -> None:
        """Take one answer, or its absence."""
        exceptions = self._ray.exceptions
        try:
            answer = self._ray.get(reference)
        # Before RayError, which is its base: a mistake in our code is no lost machine.
        except exceptions.RayTaskError as problem:
            # Raised by our own code in the actor, not by an item.
            raise problem.cause from None
        except exceptions.RayError as problem:
            self._lose(actor, queue, done, why=str(problem))
            return
        if actor.starting is not None:
            self._check_installation(answer)
            # In a row only, and only until one has started: from then on the cluster has shown that
            # it works.
            self._failed_starts, self._first_start_by = 0, float("inf")
            actor.starting = None
            return
        _, batch = actor.batches.popleft()
        for item, result in zip(batch, answer, strict=True):
            # Attempts were counted where they were made.
            self._keep(item, result, done)
        self._expect(actor)

    def _check_installation(self, digest: str) -> None:
        if digest != self._installation:
            raise EngineUnavailable(
                "runtime.engine is 'ray', but a machine of the cluster has other code in "
                "components/, another Python or other decoders than this one, so rows would "
                "differ: install the same commit from the same lock everywhere"
            )

    def _settle_late(self, queue: deque[Item], done: dict[int, Any]) -> None:
        """Give up actors that are past their time.

        Raises:
            WorkersDoNotStart: the cluster had no room for any.
        """
        now = time.monotonic()
        if now >= self._first_start_by:
            raise WorkersDoNotStart(
                f"no machine of the Ray cluster had room for an actor within {_START_TIMEOUT_S:g} s"
            )
        for actor in [one for one in self._actors if now >= one.deadline]:
            self._lose(actor, queue, done, why="no answer")

    def _lose(self, actor: _Actor, queue: deque[Item], done: dict[int, Any], why: str) -> None:
        """Forget an actor; its items are sent again one by one.

        Raises:
            WorkersDoNotStart: three in a row died before they were ready.
        """
        self._actors.remove(actor)
        self._ray.kill(actor.handle, no_restart=True)
        if actor.starting is not None:
            self._failed_starts += 1
            if self._failed_starts >= _START_ATTEMPTS:
                lines = [line.strip() for line in why.splitlines() if line.strip()]
                raise WorkersDoNotStart(f"actors do not start: {lines[-1] if lines else why}")
            return
        items = [item for _, batch in actor.batches for item in batch]
        if len(items) == 1:
            self._finish(items[0], Failure("the actor or its machine was lost"), queue, done)
        else:
            # In front and in their order: everything else waits for their turn.
            queue.extendleft(reversed(items))
        for item in items:
            item.is_suspect = True

    def _end(self, finished: bool) -> None:
        if finished:
            # Worker processes end by themselves if they can; what takes longer dies with its actor.
            closing = [actor.handle.close.remote() for actor in self._actors]
            if closing:
                self._ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_TIMEOUT_S)
        for actor in self._actors:
            self._ray.kill(actor.handle, no_restart=True)
        self._actors.clear()
