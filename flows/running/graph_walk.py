"""The graph without any server: stages in topological order, side by side where cores allow."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from flows.running.stage_runner import StageOutcome, StageRunner, blocked

Report = Callable[[StageOutcome], None]


def walk_graph(runner: StageRunner, report: Report) -> dict[str, StageOutcome]:
    """Run every stage of `runner.graph`; stages below a failed one are blocked, others go on.

    Args:
        runner: knows the graph and runs single stages.
        report: called with each outcome as it comes.

    Returns:
        Outcome by stage name.
    """
    outcomes: dict[str, StageOutcome] = {}
    waiting = list(runner.graph)
    running: dict[Future[StageOutcome], str] = {}
    # Threads, since each only waits for a process.
    with ThreadPoolExecutor(max_workers=max(1, len(waiting))) as pool:
        try:
            # Stages above decide, cores do not: a runner keeps a stage waiting until some are free.
            while waiting or running:
                for name in [n for n in waiting if _decided(runner, n, outcomes)]:
                    waiting.remove(name)
                    blockers = [u for u in runner.graph[name].upstream if not outcomes[u].ok]
                    if blockers:
                        outcomes[name] = blocked(name, blockers)
                        report(outcomes[name])
                    else:
                        running[pool.submit(run_with_retries, runner, name)] = name
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    outcome = future.result()
                    outcomes[running.pop(future)] = outcome
                    report(outcome)
        except BaseException:
            # Ctrl-C: without this the pool would wait for hours of training.
            runner.stop()
            raise
    return outcomes


def run_with_retries(runner: StageRunner, name: str) -> StageOutcome:
    """Run a stage, again after a failure that a retry may cure, as often as its meta allows."""
    retries = runner.graph[name].meta.retries
    outcome = runner.run(name)
    # "refused" is not "failed": wrong settings stay wrong.
    while outcome.status == "failed" and retries > 0 and not runner.stopping:
        retries -= 1
        outcome = runner.run(name)
    return outcome


def _decided(runner: StageRunner, name: str, outcomes: dict[str, StageOutcome]) -> bool:
    return all(upstream in outcomes for upstream in runner.graph[name].upstream)
