"""The Prefect flow: every stage of dvc.yaml as a task, in parallel where the graph allows.

The graph comes from DVC (`graph.stage_graph`), the work from a `StageRunner`; Prefect
adds states, retries, logs and the UI. DVC is the cache, so tasks use `NO_CACHE`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, cast
from uuid import UUID

import httpx
from prefect import State, Task, flow, get_run_logger, tags, task
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.environment import project_name
from flows.history.run_history import PREFECT_FILE
from flows.pipeline.endings import pipeline_state
from flows.pipeline.server_watch import watch_server
from flows.pools.cancellation import stopped_when_cancelled
from flows.pools.ended_flow_runs import tell_end
from flows.pools.pipeline_artifacts import PipelineArtifacts
from flows.records.owners import forget_flow_run, own_flow_run
from flows.records.records import records_dir, write_json
from flows.running.graph_walk import Report, walk_graph
from flows.running.stage_runner import StageError, StageOutcome, StageRunner, blocked

RETRY_DELAY_S = 1.0
JOIN_S = 0.2
STOP_S = 30.0
"""How long the flow of a pipeline that was interrupted may take to end."""
server_lost = threading.Event()
"""Set when threads of Prefect's client were left behind that wait for a server; a process that ends
in the usual way would wait for them, too."""


def _curable(_task: Task, _run: object, state: State) -> bool:
    """Retry a crash; not bad data, where a retry cannot help."""
    problem = state.result(raise_on_failure=False)
    return isinstance(problem, StageError) and problem.outcome.status == "failed"


def _stage_task(runner: StageRunner, name: str, report: Report) -> Task:
    meta = runner.graph[name].meta

    @task(
        name=name,
        task_run_name=name,
        retries=meta.retries,
        retry_delay_seconds=RETRY_DELAY_S,
        retry_condition_fn=_curable,
        cache_policy=NO_CACHE,
        persist_result=False,
        tags=["stage", f"pool:{meta.pool}"],
    )
    def run_stage(flow_run_id: str) -> object:
        logger = get_run_logger()
        logger.info("%s: %s", name, runner.stale.get(name, "unchanged"))
        outcome = runner.run(name, prefect_run=flow_run_id)
        logger.info("%s in %.1f s: %s", outcome.status, outcome.seconds, outcome.message)
        if not outcome.ok:
            # Raised, because only an exception makes Prefect retry; it is reported once it is
            # final.
            raise StageError(outcome)
        report(outcome)
        state_name = "Skipped" if outcome.status == "skipped" else "Completed"
        return Completed(name=state_name, message=outcome.message, data=outcome)

    return run_stage


def run_tasks(runner: StageRunner, report: Report) -> dict[str, StageOutcome]:
    """Run the graph of `runner` as tasks of the Prefect flow that this is called in.

    Args:
        runner: runs single stages.
        report: called with each outcome as it comes.

    Returns:
        Outcome by stage name.
    """
    run_id = str(flow_run.id)
    parent = getattr(runner, "parent_record", None)
    if parent is not None:
        # For `ultraflux history`; the server may be gone by the time somebody asks.
        place = records_dir(runner.root) / parent / PREFECT_FILE
        write_json(place, {"flow_run_id": run_id, "api": os.environ.get("PREFECT_API_URL", "")})
    with PipelineArtifacts(runner.root, runner) as artifacts:

        def tell(outcome: StageOutcome) -> None:
            artifacts.ended(outcome)
            report(outcome)

        futures: dict[str, PrefectFuture] = {}
        for name, node in runner.graph.items():
            upstream = [futures[other] for other in node.upstream]
            futures[name] = _stage_task(runner, name, tell).submit(run_id, wait_for=upstream)
        outcomes = {name: _collect(runner, name, futures) for name in runner.graph}
        for outcome in outcomes.values():
            if not outcome.ok:
                tell(outcome)
    return outcomes


class RunOnce:
    """A runner whose stages run once, whoever asks: the flow's tasks, or the walk without them."""

    def __init__(self, runner: StageRunner) -> None:
        """Share `runner`."""
        self._runner = runner
        self._lock = threading.Lock()
        self._results: dict[str, Future[StageOutcome]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, name: str, *, prefect_run: str | None = None) -> StageOutcome:
        """As the runner's, but waits where the stage runs already; one that failed runs again."""
        with self._lock:
            before = self._results.get(name)
            mine = before is None or (before.done() and not before.result().ok)
            if mine:
                self._results[name] = Future()
            result = self._results[name]
        if mine:
            try:
                result.set_result(self._runner.run(name, prefect_run=prefect_run))
            except BaseException as problem:
                result.set_exception(problem)
        return result.result()


def build_flow(
    runner: StageRunner, report: Report, say: Callable[[str], None] = print
) -> Callable[[], dict[str, StageOutcome]]:
    """The flow over the graph of `runner`.

    Args:
        runner: runs single stages.
        report: called with each outcome as it comes.
        say: gets a line when the Prefect server has gone.

    Returns:
        A function without parameters that runs it and returns the outcome of every stage. Where the
        run was cancelled in Prefect, `runner` was stopped. Where the server goes away, the rest of
        the graph runs without it, and threads of Prefect's client that still try to reach it are
        left behind (`server_lost` is set).
    """
    workers: ThreadPoolTaskRunner[StageOutcome] = ThreadPoolTaskRunner(len(runner.graph) or 1)
    outcomes: dict[str, StageOutcome] = {}
    shared = cast(StageRunner, RunOnce(runner))
    told: set[str] = set()

    def tell(outcome: StageOutcome) -> None:
        # After a change of walker both report what was running then.
        if outcome.name not in told:
            told.add(outcome.name)
            report(outcome)

    @flow(
        name="ultraflux-pipeline",
        task_runner=workers,  # type: ignore[arg-type]
        persist_result=False,
    )
    def pipeline() -> State:
        own_flow_run(runner.root, str(flow_run.id))
        ids.append(str(flow_run.id))
        with stopped_when_cancelled(UUID(str(flow_run.id)), runner.stop):
            outcomes.update(run_tasks(shared, tell))
        return pipeline_state(outcomes.values(), stopped=runner.stopping)

    problems: list[BaseException] = []
    ids: list[str] = []

    def in_prefect() -> None:
        try:
            with tags(project_name(runner.root)):
                state = pipeline(return_state=True)
            if not outcomes:
                state.result()
        except BaseException as problem:
            problems.append(problem)

    def run() -> dict[str, StageOutcome]:
        thread = threading.Thread(target=in_prefect, name="prefect-flow", daemon=True)
        with watch_server(os.environ["PREFECT_API_URL"]) as gone:
            thread.start()
            try:
                while thread.is_alive() and not gone.is_set():
                    thread.join(JOIN_S)
                if gone.is_set() or any(map(_is_out_of_reach, problems)):
                    say(
                        f"The Prefect server at {os.environ['PREFECT_API_URL']} has gone: "
                        f"{runner.without_server}"
                    )
                    server_lost.set()
                    outcomes.update(walk_graph(shared, tell))
                    if ids:
                        # It may be back by now.
                        end = pipeline_state(outcomes.values(), stopped=runner.stopping)
                        tell_end(runner.root, ids[0], end)
                    return outcomes
            except KeyboardInterrupt:
                # The flow says that it was stopped; the stages were.
                deadline = time.monotonic() + STOP_S
                while thread.is_alive() and not gone.is_set() and time.monotonic() < deadline:
                    thread.join(JOIN_S)
                if thread.is_alive():
                    server_lost.set()
                raise
        if problems:
            raise problems[0]
        for flow_run_id in ids:
            forget_flow_run(runner.root, flow_run_id)
        return outcomes

    return run


def _is_out_of_reach(problem: BaseException | None) -> bool:
    """Whether the server could not be reached; Prefect wraps that where a flow begins."""
    while problem is not None and not isinstance(problem, httpx.TransportError):
        problem = problem.__cause__
    return problem is not None


def run_in_prefect(runner: StageRunner, report: Report) -> dict[str, StageOutcome]:
    """`run_tasks` in the flow of the calling thread; in one of its own where there is none."""
    if FlowRunContext.get() is not None:
        return run_tasks(runner, report)
    return build_flow(runner, report)()


def _collect(runner: StageRunner, name: str, futures: dict[str, PrefectFuture]) -> StageOutcome:
    """The outcome of one stage; waits first, because a raising result would cancel siblings."""
    future = futures[name]
    future.wait()
    state = future.state
    if not state.is_final():
        # Prefect leaves a task whose upstream failed in NotReady for ever.
        return blocked(
            name, [u for u in runner.graph[name].upstream if not futures[u].state.is_completed()]
        )
    result = state.result(raise_on_failure=False)
    if isinstance(result, StageOutcome):
        return result
    if isinstance(result, StageError):
        return result.outcome
    said = str(state.message or state.name).removeprefix("Task run encountered an exception ")
    return StageOutcome(name, "failed", message=f"{name}: {said}")
