"""The command `ultraflux chaos`."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.commands.command_line import fail, print_json, project_root

ENGINES = ("local", "prefect", "pools")
EPILOG = """Examples:

  ultraflux chaos --minutes 10

  ultraflux chaos --minutes 60 --engine local --engine pools --ranks 2 --seed 3

  ultraflux chaos --minutes 30 --within vae --within dit_stage1 --every 4 --ranks 2

  ultraflux chaos --as-is --minutes 600 --folder /scratch/drill

The commit that is checked out is cloned into a folder of its own, made small (conf/small.yaml) and
run once alone, then again and again while its processes are killed, its remote goes away and its
disk gets full. Only processes that the drill itself has started are touched, all on this machine's
loopback. Exit code 1: a final hash differs, something is left running, something is left on disk
that `ultraflux clean` does not list, or a run ends in a traceback."""


def chaos(
    minutes: Annotated[
        float, typer.Option(min=0.0, help="For how long faults are sent; the last round then ends.")
    ],
    seed: Annotated[int, typer.Option(help="Of the schedule: the same seed, the same faults.")] = 0,
    faults: Annotated[int, typer.Option(min=1, help="At most so many faults.")] = 1_000_000,
    every: Annotated[
        float, typer.Option(min=0.1, help="Mean seconds between faults of one start.")
    ] = 12.0,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="local, prefect or pools; several take turns (default: all three)."),
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only faults of this kind; several may be given.")
    ] = None,
    within: Annotated[
        list[str] | None,
        typer.Option(help="Only while this stage is at work; several may be given."),
    ] = None,
    ranks: Annotated[
        int, typer.Option(min=1, max=8, help="Training processes; two and more have a torchrun.")
    ] = 1,
    as_is: Annotated[
        bool, typer.Option("--as-is", help="With the project's own settings and photographs.")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Work here and keep it (default: a temporary folder).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON at the end.")] = False,
) -> None:
    """Kill, starve and cut off a pipeline of one's own at random; is every result the same?"""
    from flows.experiments.chaos.drill import Drill
    from flows.experiments.chaos.faults import WEIGHTS, schedule
    from flows.experiments.chaos.site import ChaosRefused, make_site, small
    from flows.services import postgres, served
    from flows.services.servers import ServiceError
    from flows.versioning import graph as versioning

    root = project_root()
    engines = engine or list(ENGINES)
    if wrong := [one for one in engines if one not in ENGINES]:
        raise fail(f"--engine {wrong[0]}: choose local, prefect or pools")
    if wrong := [one for one in kind or [] if one not in WEIGHTS]:
        raise fail(f"--kind {wrong[0]}: choose from {', '.join(WEIGHTS)}")
    stages = versioning.stage_graph(root) if within else {}
    if wrong := [one for one in within or [] if one not in stages]:
        raise fail(f"--within {wrong[0]}: choose from {', '.join(stages)}")
    place = (folder or Path(tempfile.mkdtemp(prefix="ultraflux-chaos-"))).resolve()
    if place.exists() and any(place.iterdir()):
        raise fail(f"{place} is not empty: name a new folder")
    place.mkdir(parents=True, exist_ok=True)
    try:
        postgres.find_programs()
        on_postgres = not served.missing_packages()
    except ServiceError:
        on_postgres = False

    def say(line: str) -> None:
        typer.echo(line, err=as_json)

    # Ended by whatever, a drill first stops what it has started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    settings: dict[str, Any] | None = None
    report = None
    try:
        if not as_is:
            settings = small(root)["settings"] | ({"runtime.processes": ranks} if ranks > 1 else {})
        site = make_site(root, place, f"{os.getpid()}-{secrets.token_hex(8)}", settings)
        say(
            f"drill in {place}, seed {seed}, servers on {'PostgreSQL' if on_postgres else 'SQLite'}"
        )
        drill = Drill(
            site,
            schedule(seed, every, kind or list(WEIGHTS)),
            lasts_s=60 * minutes,
            most_faults=faults,
            served=on_postgres,
            say=say,
            within=within or (),
        )
        report = drill.run(engines)  # type: ignore[arg-type]
    except ChaosRefused as problem:
        raise fail(f"{problem} (kept: {place})", 1) from None
    except KeyboardInterrupt:
        raise fail(
            f"interrupted; what the drill had started is stopped (kept: {place})", 130
        ) from None
    finally:
        if folder is None and report is not None and not report.problems:
            shutil.rmtree(place, ignore_errors=True)
    if as_json:
        values = {
            "seed": seed,
            "faults": [fault.as_dict() for fault in report.faults],
            "rounds": report.rounds,
            "starts": report.starts,
            "seconds": report.seconds,
            "problems": report.problems,
        }
        print_json(values)
    else:
        print(report.table())
        print(
            f"{len(report.faults)} faults, {report.rounds} rounds, {report.starts} starts, "
            f"{report.seconds / 60:.0f} minutes"
        )
    if report.problems:
        raise fail("\n".join([*report.problems, f"everything is kept in {place}"]), 1)
    if not as_json:
        print("every final hash is that of the undisturbed run; nothing runs, nothing is left")
