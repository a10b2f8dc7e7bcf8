"""`ultraflux evaluate`: systems against a benchmark suite."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.command_line import fail, refusing, workplace

if TYPE_CHECKING:
    from components.evaluation.suites.suites import Suite
    from components.evaluation.suites.system import Sampling
    from components.settings.schema import Settings

_OF_SCORES = {
    "metrics",
    "ledger",
    "workers",
    "baseline",
    "refine",
    "any_size",
    "stop_when_decided",
    "looks",
    "relock",
}
_OF_RUNTIME = {"size", "warm_up", "repeats", "way"}
"""Options that the other kind of suite would leave unread."""

EPILOG = """Suites: aesthetic-eval-4096, aesthetic-eval-2048, aspect-ratio, reconstruction, detail,
held-out, runtime, or a folder with metadata.jsonl (an object a line: file_name, text).

Systems: NAME=SPEC, where SPEC is a folder of pictures; references; trained; ultraflux-v1,
ultraflux-v1.1, sana, pixart-sigma or the name of a backbone, for its published weights (folders
below weights/); ultraflux:FOLDER; diffusers:FOLDER; vae:FOLDER; registry:MODEL@ALIAS or
registry:MODEL/VERSION; or command:TEMPLATE.

Examples:

  ultraflux evaluate data/benchmarks/mine --system photos=references --system mine=outputs/mine

  ultraflux evaluate aesthetic-eval-4096 --system ours=trained --system sana=sana --limit 8

  ultraflux evaluate mine --system old=pictures/old --system new=pictures/new --baseline old

  ultraflux evaluate held-out --system champion=registry:ultraflux-transformer@champion

  ultraflux evaluate aspect-ratio --system "mine=command:python my.py --prompts {prompts}
  --out {out} --size {width}x{height}"

  ultraflux evaluate reconstruction --system flux=vae:weights/FLUX.1-dev/vae

  ultraflux evaluate runtime --system ours=trained --system sana=sana --size 4096x4096"""


def _check_options(ctx: typer.Context, suite: Suite, *, is_runtime: bool) -> None:
    """Raises ValueError where an option was typed that this suite does not read."""
    unread = _OF_SCORES if is_runtime else _OF_RUNTIME
    sources = (
        (option, ctx.get_parameter_source(option.name or "")) for option in ctx.command.params
    )
    typed = [option for option, source in sources if source and source.name != "DEFAULT"]
    for option in typed:
        if option.name in unread:
            of = "suites with scores" if is_runtime else "the suite runtime"
            raise ValueError(f"{option.opts[0]}: of {of}, not of {suite.name}")
    names = {option.name for option in typed}
    if "looks" in names and "stop_when_decided" not in names:
        raise ValueError("--looks: of --stop-when-decided; give it with a metric")


def evaluate(
    ctx: typer.Context,
    suite: Annotated[str, typer.Argument(help="Name of a suite, or a folder; see below.")],
    system: Annotated[
        list[str] | None, typer.Option(help="NAME=SPEC; repeat for several. See below.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Ids and `weight-free` with commas, or `all`; default: the suite's."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Local copy of the suite's benchmark, if elsewhere.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first items of each stratum.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Default: runs/evaluations/SUITE.")] = None,
    ledger: Annotated[
        Path | None, typer.Option(help="Measurements so far; default: runs/ledger.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that measure, on CPUs.")] = 1,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, or cuda:0,cuda:1 (a process each); default: settings."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="System that the others are tested against, set metrics included."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Root of the pictures' seeds.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps; default: the system's own.")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the system's own.")] = None,
    memory: Annotated[
        str,
        typer.Option(
            help="How systems hold their weights: none, or of model-offload, block-offload, "
            "vae-slicing, vae-tiling; several with commas."
        ),
    ] = "none",
    refine: Annotated[
        bool,
        typer.Option(
            "--refine",
            help="Systems get prompts refined by a language model (settings: refiner); metrics "
            "still read the suite's.",
        ),
    ] = False,
    size: Annotated[
        list[str] | None, typer.Option(help="WIDTHxHEIGHT, repeatable; for the runtime suite.")
    ] = None,
    warm_up: Annotated[
        int, typer.Option(min=0, help="Pictures before the clock starts; for the runtime suite.")
    ] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed pictures; for the runtime suite.")] = 3,
    way: Annotated[
        list[str] | None,
        typer.Option(
            help="For the runtime suite: int8, fp8, nf4, flash, flash_3, cudnn, sage, "
            "first_block:0.05, taylorseer:5 or compile, several joined by +, or all; repeatable. "
            "Each is measured against the exact pictures of up to eight prompts (--limit)."
        ),
    ] = None,
    any_size: Annotated[
        bool,
        typer.Option("--any-size", help="Measure pictures of another size too, in a table apart."),
    ] = False,
    stop_when_decided: Annotated[
        str | None,
        typer.Option(
            help="Metric: look after groups of prompts and stop once it tells every system from "
            "--baseline, at a false-positive rate of 5% over all looks."
        ),
    ] = None,
    looks: Annotated[int, typer.Option(min=1, help="With --stop-when-decided.")] = 5,
    relock: Annotated[
        bool,
        typer.Option(
            "--relock",
            help="Replace a result in the folder that was measured otherwise (another suite, "
            "protocol, weights, sampling or code), which is refused else.",
        ),
    ] = False,
    log: Annotated[bool, typer.Option("--log", help="Also as a run in MLflow.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print the path of the scores and errors alone.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object instead of tables.")
    ] = False,
) -> None:
    """Measure systems on a suite; what has been measured before is not measured again.

    Writes scores.parquet (a row per picture and metric), metrics.json (means with 95% intervals)
    and pictures.jsonl. Metrics whose weights are missing are listed once, with the command that
    gets them, and the others are measured. Ended at any time, the same command goes on.

    The runtime suite writes runtime.json instead: seconds, pictures per second and peak memory;
    with --way it writes ways.json: PSNR, SSIM and blocks computed of each way.
    """
    from components.engine.ordered_pool import WorkersDoNotStart
    from components.evaluation.measuring.evaluation_lock import check_lock, lock_of, write_lock
    from components.evaluation.measuring.evaluation_run import RunOptions, open_metrics
    from components.evaluation.measuring.ledger import Ledger
    from components.evaluation.suites.result_folder import taken, write_result
    from components.evaluation.suites.suite_scores import evaluate_suite, statistics_of
    from components.evaluation.suites.suites import load_suite, runtime_items, ways_items
    from components.evaluation.suites.system import Sampling
    from components.evaluation.suites.systems import FolderSystem
    from flows.commands.images.evaluation_tables import print_result, show_result, show_tests
    from flows.commands.images.runtime import (
        compare_and_show,
        parse_sizes,
        parse_ways,
        time_and_show,
    )
    from flows.history.registered_system import find_system
    from flows.versioning.profiles import settings_of

    root = workplace()
    started = time.monotonic()
    with refusing(ValueError, WorkersDoNotStart):
        settings = settings_of(root)
        chosen = device or settings.runtime.device
        whole = load_suite(suite, root, data=data, seed=seed)
        loaded = whole.limited(limit)
        is_runtime = loaded.protocol.startswith("runtime/")
        _check_options(ctx, loaded, is_runtime=is_runtime)
        ids = metric_ids(metrics, loaded.metrics)
        sampling = Sampling(
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            dtype="float32" if chosen == "cpu" else "bfloat16",
            device=chosen.split(",")[0],
            memory=memory,
        )
        if guidance_scale is not None and not 0.0 <= guidance_scale < math.inf:
            raise ValueError(f"--guidance-scale {guidance_scale:g}: a number from 0")
        if not system:
            raise ValueError("--system: name at least one, such as --system mine=pictures/")
        systems = [find_system(text, root, settings, sampling) for text in system]
        known = frozenset(item.id for item in whole.items)
        systems = [
            dataclasses.replace(one, known=known) if isinstance(one, FolderSystem) else one
            for one in systems
        ]
        folder = out or root / "runs" / "evaluations" / loaded.name
        if is_runtime:
            sizes, ways = parse_sizes(size), parse_ways(way or ())
            with taken(folder):
                if ways:
                    items = ways_items(sizes, limit)
                    timed, failed = compare_and_show(
                        systems, ways, items, sampling, folder, as_json=as_json
                    )
                else:
                    items = runtime_items(sizes)
                    timed, failed = time_and_show(
                        systems,
                        items,
                        sampling,
                        folder,
                        warm_up=warm_up,
                        repeats=repeats,
                        as_json=as_json,
                    )
            if log:
                file = folder / ("ways.json" if ways else "runtime.json")
                _log(root, loaded, timed, [file], is_complete=not failed)
            if failed:
                raise fail("\n".join(failed), 1)
            return
        options = RunOptions(
            weights_dir=root / "weights",
            workers=workers,
            devices=_devices(chosen),
            max_megapixels=settings.ingest.max_megapixels,
        )
        opened = open_metrics(ids, root / "weights", chosen.split(",")[0])
        refiner = settings.refiner.endpoint.model if refine else ""
        asked = _asked(sampling, seed, refiner)
        if stop_when_decided is not None:
            from components.evaluation.sequential_evaluation import check_stopping

            check_stopping(stop_when_decided, opened, baseline, [one.name for one in systems])
            asked["stopped_by"] = f"{stop_when_decided}, {looks} looks"
        lock = lock_of(loaded, opened, asked)
        with taken(folder):
            if not relock:
                check_lock(lock, folder)
            measure = functools.partial(
                evaluate_suite,
                systems=systems,
                opened=opened,
                metric_ids=ids,
                ledger=Ledger(ledger or root / "runs" / "ledger"),
                options=options,
                out_dir=folder,
                baseline=baseline,
                resamples=settings.evaluate.bootstrap_resamples,
                seed=settings.project.seed,
                any_size=any_size,
                asked_as=_refined(root, loaded, settings) if refine else {},
            )
            if stop_when_decided is None:
                result = measure(loaded)
            else:
                from components.evaluation.sequential_evaluation import evaluate_until_decided

                loaded, result = evaluate_until_decided(
                    loaded,
                    measure,
                    stop_when_decided,
                    baseline=baseline or "",
                    looks=looks,
                    seed=settings.project.seed,
                )
            written = write_result(result, loaded, folder)
            write_lock(lock, written)
    resamples, root_seed = settings.evaluate.bootstrap_resamples, settings.project.seed
    did = statistics_of(result)
    seconds = time.monotonic() - started
    scores = written / "scores.parquet"
    if as_json:
        print_result(loaded, result, scores, baseline, resamples, root_seed)
    elif not quiet:
        show_result(loaded, result, ids)
        if baseline is not None:
            show_tests(result, baseline, resamples, root_seed)
    counts = (
        f"{did['pictures']} pictures, {did['decoded']} decoded, {did['computed']} values computed, "
        f"{did['reused']} found in the ledger; {seconds:.1f} s"
    )
    if not as_json:
        print(scores if quiet else f"{counts}\nScores: {scores}")
    if written != folder and not as_json:
        print(f"A system failed: the earlier result in {folder} stays as it was")
    if log:
        files = [written / "metrics.json", written / "scores.parquet"]
        _log(root, loaded, result.metrics, files, is_complete=not result.failed_systems)
    if result.failed_systems or result.unmeasured:
        # Told at the end as well: a mean over the others is no mean of the system.
        lines = [f"{name}: {text}" for name, text in result.unmeasured.items()]
        lines += [
            text if text.startswith(f"{name}: ") else f"{name}: {text}"
            for name, text in result.failed_systems.items()
        ]
        raise fail("\n".join(lines), 1)


def _asked(sampling: Sampling, seed: int, refiner: str) -> dict[str, object]:
    """How systems sample, as far as it decides pictures."""
    return {
        "seed": seed,
        "steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
        "dtype": sampling.dtype,
        "vae_tiling": "vae-tiling" in sampling.memory,
        "refiner": refiner,
    }


def _refined(root: Path, suite: Suite, settings: Settings) -> dict[str, str]:
    """Refined prompts by the suite's; those that were kept are not among them.

    Raises:
        ValueError: the endpoint is of no use.
    """
    from flows.commands.images.generation import refined

    prompts = list(dict.fromkeys(item.prompt for item in suite.items))
    return {original: text for text, original in refined(root, prompts, settings) if original}


def metric_ids(wanted: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    """Metrics of `--metrics`.

    Raises:
        ValueError: an unknown one.
    """
    from components.evaluation.suites.suites import WEIGHT_FREE_METRICS
    from components.metrics.cards import CARDS, card

    if wanted is None:
        return default
    if wanted == "all":
        return tuple(c.id for c in CARDS)
    ids: list[str] = []
    for name in filter(None, (part.strip() for part in wanted.split(","))):
        ids += WEIGHT_FREE_METRICS if name == "weight-free" else (card(name).id,)
    return tuple(dict.fromkeys(ids))


def _devices(chosen: str) -> tuple[str, ...]:
    if chosen != "cuda":
        return tuple(chosen.split(","))
    import torch

    return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count())) or ("cuda",)


def _log(
    root: Path, suite: Suite, metrics: dict[str, float], files: list[Path], *, is_complete: bool
) -> None:
    """A run record; the uploader brings it to MLflow, now or when the server is back."""
    from flows.records.records import RunDescription, RunResult, open_record
    from flows.tracking.sync import sync_once

    params = {"suite": suite.name, "protocol": suite.protocol, "items": len(suite.items)}
    record = open_record(
        root, RunDescription(kind="stage", name=f"evaluate-{suite.name}", params=params)
    )
    record.finish(
        RunResult(
            status="FINISHED" if is_complete else "FAILED",
            metrics={name.replace("/", "_"): value for name, value in metrics.items()},
            artifacts=[str(file) for file in files],
            summary=f"{len(metrics)} numbers",
        )
    )
    sync_once(root)
