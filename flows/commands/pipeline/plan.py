"""The command `ultraflux plan`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.telemetry.wording import bytes_text, flops_text
from flows.commands.command_line import Json, fail, print_json, refusing, workplace
from flows.commands.pipeline.plan_cards import show_cards
from flows.commands.tables import table_of, terminal

if TYPE_CHECKING:
    from rich.table import Table

    from components.planning.comparison import Comparison
    from components.planning.exact import Trace
    from components.planning.planner import Plan, Rate, StagePlan
    from components.settings.schema import Settings
    from flows.history.operations_plan import OperationsPlan

EPILOG = """Examples:

  ultraflux plan

  ultraflux plan --profile paper --images 1007230 --tflops-per-gpu 989 --mfu 0.35

  ultraflux plan --profile single-gpu --gpu-memory-gib 80

  ultraflux plan --profile paper --stage dit_stage1 --gpu-memory-gib 80 --price-per-gpu-hour 3

  ultraflux plan --profile paper --exact --stage dit_stage1

  ultraflux plan --settings experiments/large.yaml --json

FLOPs, parameters, optimizer states and store sizes are exact (equal to torch's own counts); memory
agrees within 3% with a trace of the stages' own code on a GPU that is not there, which --exact
makes (a minute, no GPU needed). Hours are FLOPs / (--tflops-per-gpu x --mfu x GPUs), cost is
GPU-hours x price; nothing is measured.

Of params.yaml as it stands, the stages that the next run would compute come first, with times of
past runs (`ultraflux stage plan` shows these alone)."""

# Images in the released MultiAspect-4K-1M metadata.
PUBLISHED_IMAGES = 1_007_230
_GIB = 2**30


def plan(
    profile: Annotated[
        str | None,
        typer.Option(help="embedded, consumer-24gb, single-gpu or paper, as in conf/profiles."),
    ] = None,
    params: Annotated[
        Path | None,
        typer.Option("--settings", help="A settings file (default: params.yaml)."),
    ] = None,
    stages: Annotated[
        list[str] | None,
        typer.Option("--stage", help="Show this stage only; may be given several times."),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            help="Images that the corpus stages keep (default: those in ingest.source, or the "
            "1,007,230 of MultiAspect-4K-1M where that folder is not here)."
        ),
    ] = None,
    tflops_per_gpu: Annotated[
        float | None, typer.Option(help="Peak of one GPU in TFLOP/s, from its data sheet.")
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(help="Share of that peak that model FLOPs reach, 0 to 1; measure it."),
    ] = None,
    gpu_memory_gib: Annotated[
        float | None,
        typer.Option(
            help="Say for every stage whether a GPU of this size is enough, and if not "
            "which setting to change."
        ),
    ] = None,
    price_per_gpu_hour: Annotated[
        float | None, typer.Option(help="In any currency; needs hours (see --mfu).")
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Run the stages' own code on a GPU that is not there: peak of memory with its "
            "line beside the formula, waits of the processor, operations in float64.",
        ),
    ] = False,
    cards: Annotated[
        bool,
        typer.Option(
            "--cards",
            help="For cards of 8 to 141 GB: what is enough for training an adapter and for "
            "sampling at 1024, 2048 and 4096 px, with which settings, at what error.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what would run and what it costs before it does: stages, FLOPs, GPU memory, disk."""
    from components.planning.planner import plan as make

    if gpu_memory_gib is not None and not 0 < gpu_memory_gib * _GIB < math.inf:
        raise fail(f"--gpu-memory-gib {gpu_memory_gib}: must be a number above 0")
    if price_per_gpu_hour is not None and not 0 <= price_per_gpu_hour < math.inf:
        raise fail(f"--price-per-gpu-hour {price_per_gpu_hour}: must be a number from 0")
    root = workplace()
    rate = _rate(tflops_per_gpu, mfu)
    with refusing(ValueError):
        settings = _settings(root, profile, params)
        if cards:
            show_cards(settings, root, as_json=as_json)
            return
        count, counted = (images, "--images") if images is not None else _images(root, settings)
        limit = None if gpu_memory_gib is None else int(gpu_memory_gib * _GIB)
        made = make(settings, root, count, rate, limit=limit)
    made = _only(made, stages or [])
    traced = _traced(settings, root, made) if exact else []
    next_run = _next_run(root) if profile is None and params is None else None
    if as_json:
        values = as_dict(made, counted, limit, price_per_gpu_hour)
        if next_run is not None:
            values["next_run"] = next_run.as_dict(price_per_gpu_hour)
        if exact:
            values["exact"] = [asdict(comparison) for comparison in traced]
        print_json(values)
        return
    if next_run is not None:
        _show_next_run(next_run, price_per_gpu_hour, stages or [])
    show(made, counted, limit, price_per_gpu_hour)
    if exact:
        _show_traces(traced)


def _traced(settings: Settings, root: Path, made: Plan) -> list[Comparison]:
    """Traces of the plan's stages; where something is missing for one, a line says what."""
    # Imports torch and the stages, which the formulas do without.
    from components.planning.comparison import compare_stage

    found: list[Comparison] = []
    before: dict[Any, Trace] = {}
    for stage in made.stages:
        try:
            found.append(compare_stage(stage, settings, root, before))
        except (ImportError, ValueError) as problem:
            print(f"{stage.stage}: not traced: {problem}", file=sys.stderr)
    return found


def _show_traces(found: Sequence[Comparison]) -> None:
    from components.planning.exact import host_peak_bytes

    console = terminal()
    rows = (
        (
            one.stage,
            one.what,
            *map(bytes_text, (one.held_bytes, one.peak_bytes, one.formula_bytes)),
            f"{100 * one.difference:+.1f}%",
            str(sum(one.waits.values())),
            str(sum(one.doubles.values())),
        )
        for one in found
    )
    title = "Traced: the stages' own code, one process on a GPU that is not there"
    columns = ("stage", "traced", "held", "peak", "formula", "difference", "waits", "float64")
    console.print(_table(title, columns, rows))
    for one in found:
        console.print(f"{one.stage}, {one.what}: peak at {one.at}", soft_wrap=True, markup=False)
        for what, places in (("waits for the GPU", one.waits), ("float64", one.doubles)):
            for place, times in places.items():
                console.print(f"  {what}: {times} x {place}", soft_wrap=True, markup=False)
    seconds = sum(one.seconds for one in found)
    console.print(
        f"{seconds:.0f} s, {bytes_text(host_peak_bytes())} of this machine's memory at most"
    )


def _next_run(root: Path) -> OperationsPlan:
    """What the clone has to do; of another profile or settings file DVC knows nothing."""
    from flows.history.operations_plan import plan_operations
    from flows.versioning.graph import GraphError

    with refusing(GraphError):
        return plan_operations(root)


def _show_next_run(next_run: OperationsPlan, price: float | None, stages: list[str]) -> None:
    from flows.history.operations_plan import operations_summary, operations_table

    console = terminal(highlight=False)
    console.print(operations_table(next_run, price, stages))
    console.print(operations_summary(next_run, price) + "\n", soft_wrap=True)


def _only(made: Plan, wanted: list[str]) -> Plan:
    """The plan with some of its stages and the warnings about them; all where none is named."""
    known = [stage.stage for stage in made.stages]
    for name in wanted:
        if name not in known:
            raise fail(
                f"--stage {name}: not a stage that uses a GPU; choose from {', '.join(known)}"
            )
    if not wanted:
        return made
    return replace(
        made,
        stages=tuple(stage for stage in made.stages if stage.stage in wanted),
        warnings=tuple(text for text in made.warnings if text.partition(":")[0] in wanted),
    )


def _rate(tflops_per_gpu: float | None, mfu: float | None) -> Rate | None:
    """The stated rate; both numbers or none."""
    from components.planning.planner import Rate

    if tflops_per_gpu is None and mfu is None:
        return None
    if tflops_per_gpu is None or mfu is None:
        raise fail("--tflops-per-gpu and --mfu: give both, or neither")
    if not (0 < tflops_per_gpu * 1e12 < math.inf and 0 < mfu <= 1):
        raise fail(f"--tflops-per-gpu {tflops_per_gpu} --mfu {mfu}: above 0, mfu at most 1")
    return Rate(tflops_per_gpu * 1e12 * mfu, f"{tflops_per_gpu:g} TFLOP/s x MFU {mfu:g} (stated)")


def _settings(root: Path, profile: str | None, params: Path | None) -> Settings:
    from components.settings.schema import load_settings, parse_settings
    from components.settings.yaml_files import parse_yaml
    from flows.versioning.profiles import compose

    if profile is not None and params is not None:
        raise fail("--profile and --settings: give one of them")
    if profile is None:
        if params is None and not (root / "params.yaml").is_file():
            raise fail(f"no UltraFlux project at or above {root}: give --profile or --settings")
        return load_settings(params or root / "params.yaml")
    return parse_settings(
        parse_yaml(compose(root, profile), f"profile {profile}"), where=f"profile {profile}"
    )


def _images(root: Path, settings: Settings) -> tuple[int, str]:
    """(images, where the number comes from)."""
    from components.corpus.listing.source_files import photographs

    folder = root / settings.ingest.source
    if settings.ingest.kind == "folder" and folder.is_dir():
        files = photographs(folder, settings.ingest.extensions, recursive=settings.ingest.recursive)
        found = sum(1 for _ in files)
        if found:
            return found, f"files in {settings.ingest.source}, before any is rejected"
    return PUBLISHED_IMAGES, "MultiAspect-4K-1M as published; set --images"


def as_dict(
    made: Plan, counted: str, limit: int | None = None, price: float | None = None
) -> dict[str, Any]:
    """The plan as plain values, with the sums that its properties make.

    Args:
        made: the plan.
        counted: where the number of images comes from.
        limit: memory of one GPU in bytes; adds `verdict` and `fits` to each stage.
        price: of a GPU-hour; adds `cost` to each stage.
    """
    values = asdict(made)
    values["images_from"] = counted
    for row, stage in zip(values["stages"], made.stages, strict=True):
        row["model_flops"], row["hardware_flops"] = stage.model_flops, stage.hardware_flops
        row["gpu_hours"], row["memory_bytes"] = stage.gpu_hours, stage.memory_bytes
        if limit is not None:
            row["verdict"] = stage.taken.verdict(limit)
            row["fits"] = row["verdict"] == "fits"
        if price is not None:
            row["cost"] = None if stage.gpu_hours is None else stage.gpu_hours * price
        row["memory"]["states"] = stage.memory.states
        row["memory"]["total"] = stage.memory.total
    return values


def show(made: Plan, counted: str, limit: int | None = None, price: float | None = None) -> None:
    """Print the tables; arguments as `as_dict`."""
    console = terminal()
    console.print(f"Profile {made.profile}, {made.images:,} images ({counted})")
    for network, origin in made.origin.items():
        console.print(f"  {network}: {origin}")
    for table in (
        _bucket_table(made),
        _work_table(made, price),
        _memory_table(made),
        _zero_table(made),
        _disk_table(made),
    ):
        console.print(table)
    for source in sorted({stage.rate for stage in made.stages if stage.rate}):
        console.print(f"Hours at: {source}")
    for stage in made.stages:
        if stage.core_rate is not None:
            console.print(
                f"{stage.stage}: {_duration(stage.core_hours)} core-hours before the GPU begins, "
                f"{stage.core_rate}"
            )
    if any(stage.hours is None for stage in made.stages):
        console.print("Hours left out: give --tflops-per-gpu and --mfu.")
    if limit is not None:
        for stage in made.stages:
            console.print(_verdict(stage, limit))
    for warning in made.warnings:
        console.print(f"[yellow]warning:[/] {warning}")


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    # The name of a row stays whole, whatever else wraps.
    return table_of(columns, rows, title=title, left=(0,), whole=(0,))


def _bucket_table(made: Plan) -> Table:
    """Buckets with equal numbers of tokens share a row."""
    columns = (
        "buckets (height x width)",
        "image tokens",
        "forward",
        "forward + backward",
        "recomputed",
    )
    names: dict[int, list[str]] = {}
    by_tokens = {bucket.image_tokens: bucket for bucket in made.buckets}
    for bucket in made.buckets:
        names.setdefault(bucket.image_tokens, []).append(bucket.name)
    rows = []
    for tokens in sorted(names):
        bucket = by_tokens[tokens]
        flops = (bucket.forward, bucket.training, bucket.recompute)
        rows.append((", ".join(names[tokens]), f"{tokens:,}", *map(flops_text, flops)))
    return _table("Transformer, one image per bucket (exact)", columns, rows)


def _work_table(made: Plan, price: float | None) -> Table:
    columns = (
        "stage",
        "items",
        "per item",
        "validation",
        "total",
        "with recomputation",
        "GPUs",
        "hours",
        "GPU-hours",
        *([] if price is None else ["cost"]),
    )
    rows = (
        (
            stage.stage,
            f"{stage.items:,} {stage.work}",
            flops_text(stage.flops_per_item.model),
            flops_text(stage.validation) if stage.validation else "-",
            flops_text(stage.model_flops),
            flops_text(stage.hardware_flops),
            str(stage.gpus),
            _duration(stage.hours),
            _duration(stage.gpu_hours),
            *([] if price is None else [_cost(stage, price)]),
        )
        for stage in made.stages
    )
    title = "Work (buckets equally frequent; model FLOPs, without recomputation)"
    return _table(title, columns, rows)


def _cost(stage: StagePlan, price: float) -> str:
    return "-" if stage.gpu_hours is None else f"{stage.gpu_hours * price:,.2f}"


def _verdict(stage: StagePlan, limit: int) -> str:
    """Whether one GPU is enough, as far as the plan knows."""
    verdict = stage.taken.verdict(limit)
    share = f"{stage.memory_bytes / _GIB:.1f} of {limit / _GIB:.1f} GiB"
    if stage.processes_per_gpu > 1:
        share += f", {stage.processes_per_gpu} processes"
    note = {
        "fits": "",
        "open": " before CUDA contexts, kernels' workspaces and fragmentation",
        "does not fit": "",
    }[verdict]
    colour = {"fits": "", "open": "[yellow]", "does not fit": "[red]"}[verdict]
    return f"{stage.stage}: {colour}{verdict}{'[/]' if colour else ''} ({share}{note})"


def _duration(hours: float | None) -> str:
    return "-" if hours is None else f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}"


def _memory_table(made: Plan) -> Table:
    title = (
        "Memory of a GPU at the fullest moment (without CUDA's context and kernels' workspaces), "
        "and of one machine"
    )
    columns = (
        "stage",
        "parameters",
        "weights",
        "gradients",
        "optimizer",
        "EMA",
        "working",
        "a process",
        "a GPU",
        "host",
    )
    rows = ((stage.stage, f"{stage.parameters:,}", *_memory_cells(stage)) for stage in made.stages)
    return _table(title, columns, rows)


def _memory_cells(stage: StagePlan) -> list[str]:
    memory, shared = stage.memory, stage.processes_per_gpu
    parts = [memory.weights, memory.gradients, memory.optimizer, memory.average]
    # Activations and buffers, or the copies of the update, whichever is more.
    parts += [memory.total - memory.states - memory.average, memory.total]
    cells = [bytes_text(part) if part else "-" for part in parts]
    times = f" ({shared} x)" if shared > 1 else ""
    return [*cells, bytes_text(stage.memory_bytes) + times, bytes_text(stage.host_bytes)]


def _zero_table(made: Plan) -> Table:
    from components.planning.advice import offered_zero_stages

    title = "States of the transformer on one GPU, by dit_stage1.zero_stage (exact)"
    rows = []
    for zero, states in made.states_by_zero.items():
        name = str(zero) if zero in offered_zero_stages() else f"{zero} (not offered)"
        rows.append((name, *map(bytes_text, (*states, sum(states)))))
    return _table(title, ("ZeRO", "weights", "gradients", "optimizer", "sum"), rows)


def _disk_table(made: Plan) -> Table:
    rows = (
        (stage.stage, what, bytes_text(size))
        for stage in made.stages
        for what, size in stage.disk.items()
    )
    return _table("Disk", ("stage", "what", "size"), rows)
