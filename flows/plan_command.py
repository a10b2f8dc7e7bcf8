"""The command `ultraflux plan`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.command_line import fail, project_root

if TYPE_CHECKING:
    from components.settings import Settings
    from components.training.planner import Plan, Rate, StagePlan

EPILOG = """Examples:

  ultraflux plan

  ultraflux plan --profile paper --images 1007230 --tflops-per-gpu 989 --mfu 0.35

  ultraflux plan --profile single-gpu --gpu-memory-gib 80

  ultraflux plan --params experiments/large.yaml --json

FLOPs, parameters, optimizer states and store sizes are exact; activations and buffers are
estimates. Hours follow from --tflops-per-gpu times --mfu; nothing is measured."""

# Images in the released MultiAspect-4K-1M metadata.
PUBLISHED_IMAGES = 1_007_230
_GIB = 2**30
# Every rank of the trainer holds whole parameters.
_NOT_OFFERED = 3


def plan(
    profile: Annotated[
        str | None, typer.Option(help="embedded, single-gpu or paper, as in conf/profiles.")
    ] = None,
    params: Annotated[
        Path | None, typer.Option(help="A settings file (default: params.yaml).")
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
        float | None, typer.Option(help="Warn where one GPU of this size is too small.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what a settings file costs before it runs: FLOPs, GPU memory, disk, GPU-hours."""
    from components.settings import SettingsError
    from components.training.planner import plan as make

    if gpu_memory_gib is not None and gpu_memory_gib <= 0:
        raise fail(f"--gpu-memory-gib {gpu_memory_gib}: must be above 0")
    root = project_root()
    rate = _rate(tflops_per_gpu, mfu)
    try:
        settings = _settings(root, profile, params)
        count, counted = (images, "--images") if images is not None else _images(root, settings)
        limit = None if gpu_memory_gib is None else int(gpu_memory_gib * _GIB)
        made = make(settings, root, count, rate, limit=limit)
    except (SettingsError, ValueError) as problem:
        raise fail(str(problem)) from None
    if as_json:
        print(json.dumps(as_dict(made, counted), indent=2))
    else:
        show(made, counted)


def _rate(tflops_per_gpu: float | None, mfu: float | None) -> Rate | None:
    """The stated rate; both numbers or none."""
    from components.training.planner import Rate

    if tflops_per_gpu is None and mfu is None:
        return None
    if tflops_per_gpu is None or mfu is None:
        raise fail("--tflops-per-gpu and --mfu: give both, or neither")
    if tflops_per_gpu <= 0 or not 0 < mfu <= 1:
        raise fail(f"--tflops-per-gpu {tflops_per_gpu} --mfu {mfu}: above 0, mfu at most 1")
    return Rate(tflops_per_gpu * 1e12 * mfu, f"{tflops_per_gpu:g} TFLOP/s x MFU {mfu:g} (stated)")


def _settings(root: Path, profile: str | None, params: Path | None) -> Settings:
    from components.settings import load_settings, parse_settings
    from flows.profiles import compose

    if profile is not None and params is not None:
        raise fail("--profile and --params: give one of them")
    if profile is None:
        return load_settings(params or root / "params.yaml")
    import yaml

    return parse_settings(yaml.safe_load(compose(root, profile)), where=f"profile {profile}")


def _images(root: Path, settings: Settings) -> tuple[int, str]:
    """(images, where the number comes from)."""
    folder = root / settings.ingest.source
    if settings.ingest.kind == "folder" and folder.is_dir():
        wanted = {extension.lower() for extension in settings.ingest.extensions}
        files = folder.rglob("*") if settings.ingest.recursive else folder.glob("*")
        found = sum(path.suffix.lower() in wanted for path in files)
        if found:
            return found, f"files in {settings.ingest.source}, before any is rejected"
    return PUBLISHED_IMAGES, "MultiAspect-4K-1M as published; set --images"


def as_dict(made: Plan, counted: str) -> dict[str, Any]:
    """The plan as plain values, with the sums that its properties make."""
    values = asdict(made)
    values["images_from"] = counted
    for row, stage in zip(values["stages"], made.stages, strict=True):
        row["model_flops"], row["hardware_flops"] = stage.model_flops, stage.hardware_flops
        row["gpu_hours"], row["memory_bytes"] = stage.gpu_hours, stage.memory_bytes
        if stage.memory is not None:
            row["memory"]["states"] = stage.memory.states
            row["memory"]["total"] = stage.memory.total
    return values


def show(made: Plan, counted: str) -> None:
    """Print the tables."""
    from rich.console import Console

    console = Console()
    console.print(f"Profile {made.profile}, {made.images:,} images ({counted})")
    for network, origin in made.origin.items():
        console.print(f"  {network}: {origin}")
    for table in (
        _bucket_table(made),
        _work_table(made),
        _memory_table(made),
        _zero_table(made),
        _disk_table(made),
    ):
        console.print(table)
    for source in sorted({stage.rate for stage in made.stages if stage.rate}):
        console.print(f"Hours at: {source}")
    if any(stage.hours is None for stage in made.stages):
        console.print("Hours left out: give --tflops-per-gpu and --mfu.")
    for warning in made.warnings:
        console.print(f"[yellow]warning:[/] {warning}")


def flops_text(flops: float) -> str:
    """Operations with a unit, three digits: "418 TFLOP"."""
    for unit, size in (("ZFLOP", 1e21), ("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if flops >= 0.9995 * size:
            return f"{flops / size:.3g} {unit}"
    return f"{flops / 1e9:.3g} GFLOP"


def bytes_text(count: float) -> str:
    """Bytes with a decimal unit, as disks and data sheets state them."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _bucket_table(made: Plan) -> Any:
    """Buckets with equal numbers of tokens share a row."""
    table = _table(
        "Transformer, one image per bucket (exact)",
        "buckets (height x width)",
        "image tokens",
        "forward",
        "forward + backward",
        "recomputed",
    )
    rows: dict[int, list[str]] = {}
    by_tokens = {bucket.image_tokens: bucket for bucket in made.buckets}
    for bucket in made.buckets:
        rows.setdefault(bucket.image_tokens, []).append(bucket.name)
    for tokens in sorted(rows):
        bucket = by_tokens[tokens]
        flops = (bucket.forward, bucket.training, bucket.recompute)
        table.add_row(", ".join(rows[tokens]), f"{tokens:,}", *map(flops_text, flops))
    return table


def _work_table(made: Plan) -> Any:
    table = _table(
        "Work (buckets equally frequent; model FLOPs, without recomputation)",
        "stage",
        "items",
        "per item",
        "validation",
        "total",
        "with recomputation",
        "GPUs",
        "hours",
        "GPU-hours",
    )
    for stage in made.stages:
        table.add_row(
            stage.stage,
            f"{stage.items:,} {stage.work}",
            flops_text(stage.flops_per_item.model),
            flops_text(stage.validation) if stage.validation else "-",
            flops_text(stage.model_flops),
            flops_text(stage.hardware_flops),
            str(stage.gpus),
            _duration(stage.hours),
            _duration(stage.gpu_hours),
        )
    return table


def _duration(hours: float | None) -> str:
    return "-" if hours is None else f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}"


def _memory_table(made: Plan) -> Any:
    table = _table(
        "Memory of one GPU (activations and buffers estimated; CUDA context not included)",
        "stage",
        "parameters",
        "weights",
        "gradients",
        "optimizer",
        "EMA",
        "activations",
        "buffers",
        "total",
    )
    for stage in made.stages:
        table.add_row(stage.stage, f"{stage.parameters:,}", *_memory_cells(stage))
    return table


def _memory_cells(stage: StagePlan) -> list[str]:
    memory = stage.memory
    if memory is None:
        unknown = ["-"] * 5
        return [bytes_text(stage.weights_bytes), *unknown, f"> {bytes_text(stage.weights_bytes)}"]
    parts = [memory.weights, memory.gradients, memory.optimizer, memory.average]
    parts += [memory.activations, memory.buffers, memory.total]
    return [bytes_text(part) if part else "-" for part in parts]


def _zero_table(made: Plan) -> Any:
    title = "States of the transformer on one GPU, by dit_stage1.zero_stage (exact)"
    table = _table(title, "ZeRO", "weights", "gradients", "optimizer", "sum")
    for zero, states in made.states_by_zero.items():
        name = f"{zero} (not offered)" if zero == _NOT_OFFERED else str(zero)
        table.add_row(name, *map(bytes_text, states), bytes_text(sum(states)))
    return table


def _disk_table(made: Plan) -> Any:
    table = _table("Disk", "stage", "what", "size")
    for stage in made.stages:
        for what, size in stage.disk.items():
            table.add_row(stage.stage, what, bytes_text(size))
    return table
