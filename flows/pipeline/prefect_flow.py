"""The Prefect flow: every stage of dvc.yaml as a task, in parallel where the graph allows.

The graph comes from DVC (`graph.stage_graph`), the work from a `StageRunner`; Prefect
adds states, retries, logs and the UI. DVC is the cache, so tasks use `NO_CACHE`.
"""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

from prefect import State, Task, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.pools.cancellation import stopped_when_cancelled
from flows.pools.pipeline_artifacts import PipelineArtifacts
from flows.running.graph_walk import Report
from flows.running.stage_runner import StageError, StageOutcome, StageRunner, blocked

RETRY_DELAY_S = 1.0


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


def build_flow(runner: StageRunner, report: Report) -> Callable[[], dict[str, StageOutcome]]:
    """The flow over the graph of `runner`.

    Args:
        runner: runs single stages.
        report: called with each outcome as it comes.

    Returns:
        A function without parameters that runs it and returns the outcome of every stage. Where the
        run was cancelled in Prefect, `runner` was stopped.
    """
    workers: ThreadPoolTaskRunner[StageOutcome] = ThreadPoolTaskRunner(len(runner.graph) or 1)
    outcomes: dict[str, StageOutcome] = {}

    @flow(
        name="ultraflux-pipeline",
        task_runner=workers,  # type: ignore[arg-type]
        persist_result=False,
    )
    def pipeline() -> State | None:
        with stopped_when_cancelled(UUID(str(flow_run.id)), runner.stop) as cancelled:
            outcomes.update(run_tasks(runner, report))
        if cancelled():
            return Cancelled(message="Cancelled in Prefect; every stage was stopped.")
        return None

    def run() -> dict[str, StageOutcome]:
        state = pipeline(return_state=True)
        # A cancelled flow's result raises, and the outcomes so far are wanted.
        if not state.is_cancelled():
            state.result()
        return outcomes

    return run


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
    return StageOutcome(name, "failed", message=f"{name}: {state.message}")
