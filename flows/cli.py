"""`ultraflux`: the command line. Heavy imports stand inside the commands: `--help` is instant."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from components.files.cut_bytecode import describe_cut_bytecode, remove_cut_bytecode
from components.files.whole_files import write_text
from components.telemetry.wording import legible
from flows import environment
from flows.commands.command_line import (
    Json,
    fail,
    print_json,
    profiles,
    project_root,
    refuse_unknown_stage,
    refusing,
    silenced,
    stages,
    why_no_file,
)
from flows.commands.corpus import corpus, new, rehearse
from flows.commands.images import ablate, evaluate, generate, judge, paper, report, sign
from flows.commands.model import diagnose, weights
from flows.commands.pipeline import (
    compare,
    history,
    lineage,
    papers,
    plan,
    reproduce,
    stage_code,
    stage_plan,
    store,
    submit,
    sweep,
    training_states,
    verify,
)
from flows.commands.refusals import refusal
from flows.commands.services import chaos, clean, deploy, remote, services
from flows.commands.tables import table_of, terminal

PIPELINE, CORPUS = "Pipeline", "Corpus"
IMAGES, MODEL, SERVICES = "Images and evaluation", "Model", "Services"

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train UltraFlux: photographs in; corpus, F16 VAE, native-4K DiT, images, report out.",
    epilog="Start with [bold]ultraflux doctor[/], then [bold]ultraflux run[/].",
)
stage_app = typer.Typer(no_args_is_help=True, help="Single stages of the pipeline.")
config_app = typer.Typer(no_args_is_help=True, help="Settings: profiles and params.yaml.")
app.add_typer(stage_app, name="stage", rich_help_panel=PIPELINE)
app.add_typer(config_app, name="config", rich_help_panel=PIPELINE)
app.add_typer(corpus.app, name="corpus", rich_help_panel=CORPUS)
app.command(rich_help_panel=CORPUS, epilog=new.EPILOG)(new.new)
corpus.app.command(epilog=rehearse.EPILOG)(rehearse.rehearse)
app.add_typer(diagnose.app, name="diagnose", rich_help_panel=MODEL)
app.add_typer(weights.app, name="weights", rich_help_panel=MODEL)
app.add_typer(store.app, name="stores", rich_help_panel=PIPELINE)
app.add_typer(paper.app, name="paper", rich_help_panel=IMAGES)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"ultraflux {version('ultraflux-mlops')}")
        raise typer.Exit


ContinueFrom = Annotated[
    str | None,
    typer.Option(
        metavar="STAGE/KEY",
        help="Go on from this training state (see [bold]ultraflux stage states[/]) although "
        "settings, data or code have changed since.",
    ),
]
Restart = Annotated[
    bool,
    typer.Option(
        help="Begin training at step 0 although a run of other settings, data or code is "
        "unfinished; its state stays."
    ),
]


def _wish(
    root: Path, stages: Callable[[], Collection[str]], continue_from: str | None, restart: bool
) -> str | None:
    """Hand on to the stage's process, which DVC starts, what the person wants.

    Args:
        root: of the project.
        stages: gives those that are run.
        continue_from: state to go on from.
        restart: begin again instead.

    Returns:
        The stage of `continue_from`.
    """
    from components.training.distributed.run_states import StateRefused
    from flows.running.training_state import CONTINUE_FROM, RESTART, wished_stage

    if continue_from is not None and restart:
        raise fail("--continue-from and --restart: choose one")
    if restart:
        os.environ[RESTART] = "1"
    if continue_from is None:
        return None
    with refusing(StateRefused):
        stage = wished_stage(root, continue_from, stages())
    os.environ[CONTINUE_FROM] = continue_from
    return stage


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Version, and stop."),
    ] = False,
) -> None:
    """Options of the command itself."""
    environment.prepare()


@app.command(rich_help_panel=PIPELINE)
def run(
    engine: Annotated[
        str,
        typer.Option(
            help="local: no server. prefect: the same graph as a Prefect flow. pools: each stage "
            "on a worker (see [bold]ultraflux deploy[/])."
        ),
    ] = "local",
    remote_data: Annotated[
        bool,
        typer.Option(
            "--remote-data",
            help="With --engine pools: workers have clones of their own at the same commit; data "
            "goes over the DVC remote, nothing else is shared.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option(help="Run stages even when nothing changed.")] = False,
    until: Annotated[
        str | None,
        typer.Option(
            help="Last stage to run, with all that it needs (default: all).", autocompletion=stages
        ),
    ] = None,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="Cores to hand out to stages (default: all).")
    ] = None,
    rehearsal: Annotated[
        bool,
        typer.Option(
            help="First pass 100 items through the corpus stages when a source of more than 300 "
            "is new (see [bold]ultraflux corpus rehearse[/])."
        ),
    ] = True,
    continue_from: ContinueFrom = None,
    restart: Restart = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors alone.")] = False,
    as_json: Json = False,
) -> None:
    """Bring the whole pipeline up to date; what has not changed is skipped."""
    if engine not in {"local", "prefect", "pools"}:
        raise fail(f"--engine {engine}: choose local, prefect or pools")
    if remote_data and engine != "pools":
        raise fail("--remote-data: give --engine pools with it")
    root = project_root()
    refuse_unknown_stage(root, until)
    from components.settings.schema import SettingsError
    from flows.pipeline.pipeline_run import run_pipeline
    from flows.pipeline.preflight import PipelineRefused
    from flows.services.servers import ServiceError
    from flows.versioning.graph import GraphError, stages_until

    # The wish travels in the environment, which ends at this machine.
    if engine == "pools" and (continue_from or restart):
        raise fail(
            "--continue-from, --restart: stages of pools run elsewhere; set runtime.on_changed_run"
        )
    wished = _wish(root, lambda: stages_until(root, until), continue_from, restart)
    with (
        refusing(SettingsError, PipelineRefused, ServiceError, GraphError),
        silenced(quiet or as_json),
    ):
        summary = run_pipeline(
            root,
            engine=engine,  # type: ignore[arg-type]
            force=force,
            until=until,
            cpus=cpus,
            remote_data=remote_data,
            rehearsal=rehearsal,
        )
    if as_json:
        print_json(summary.as_dict())
    if summary.interrupted:
        raise fail("interrupted; nothing computed is lost, run it again to go on", 130)
    if not summary.ok:
        failed = [o for o in summary.outcomes.values() if o.status in {"failed", "refused"}]
        raise fail("\n".join(outcome.message for outcome in failed), 1)
    if wished is not None and summary.outcomes[wished].status == "skipped":
        print(
            f"--continue-from {continue_from}: not used, {wished} was up to date", file=sys.stderr
        )
    if quiet or as_json:
        return
    print(f"\nPipeline up to date in {summary.seconds:.0f} s.")
    if until is None:
        print(f"Report:  {root / 'data' / 'evaluate' / 'report.html'}")
    if remote_data:
        print("Here are metrics, plots and what the runs log; `dvc pull` brings the rest.")
    print("MLflow and Prefect UIs:  make services  (or: ultraflux up)")


@stage_app.command(
    "run",
    epilog="Examples: [bold]ultraflux stage run ingest[/] reads or downloads what ingest.source "
    "names; [bold]ultraflux stage run caption[/] goes on where an endpoint, a cost cap or a kill "
    "ended it. Both can be ended at any time.",
)
def stage_run(
    name: Annotated[str, typer.Argument(help="Stage in dvc.yaml.", autocompletion=stages)],
    continue_from: ContinueFrom = None,
    restart: Restart = False,
) -> None:
    """Run one stage in this process (what `dvc repro` calls)."""
    root = project_root()
    refuse_unknown_stage(root, name)
    from flows.running.recorded_stage import run_stage

    _wish(root, lambda: [name], continue_from, restart)
    rehearse.before_stage(name, root)
    raise typer.Exit(run_stage(name, root))


stage_app.command("remote", epilog=remote.STAGE_EPILOG)(remote.stage_remote)


@stage_app.command("list")
def stage_list(as_json: Json = False) -> None:
    """Stages in order, whether each is stale, and why."""
    from flows.versioning.clone import Clone
    from flows.versioning.code_files import CODE
    from flows.versioning.graph import GraphError

    clone = Clone(project_root())
    with refusing(GraphError), clone.opened():
        graph = clone.graph()
        stale = clone.stale(graph)
    rows: list[dict[str, Any]] = [
        {
            "stage": name,
            # Every stage stands after `code`.
            "after": [one for one in node.upstream if one != CODE],
            "pool": node.meta.pool,
            "stale": stale.get(name),
        }
        for name, node in graph.items()
    ]
    if as_json:
        print_json({"stages": rows})
        return
    cells = (
        (row["stage"], ", ".join(row["after"]), row["pool"], row["stale"] or "up to date")
        for row in rows
    )
    terminal().print(table_of(("stage", "after", "pool", "state"), cells))


stage_app.command("plan", epilog=stage_plan.EPILOG)(stage_plan.stage_plan)
stage_app.command("fingerprint", epilog=stage_code.FINGERPRINT_EPILOG)(stage_code.stage_fingerprint)
stage_app.command("key", epilog=training_states.KEY_EPILOG)(training_states.stage_key)
stage_app.command("states", epilog=training_states.STATES_EPILOG)(training_states.stage_states)
stage_app.command("accept", epilog=stage_code.ACCEPT_EPILOG)(stage_code.stage_accept)


@config_app.command("compose")
def config_compose(
    profile: Annotated[
        str,
        typer.Option(help="embedded, consumer-24gb, single-gpu or paper.", autocompletion=profiles),
    ] = "embedded",
    check: Annotated[bool, typer.Option(help="Only say whether params.yaml is in step.")] = False,
) -> None:
    """Write params.yaml from conf/base.yaml and a profile."""
    from components.settings.schema import SettingsError
    from flows.versioning.profiles import compose

    # Without params.yaml: this command writes it.
    root = project_root(["dvc.yaml"])
    with refusing(SettingsError):
        text = compose(root, profile)
    target = root / "params.yaml"
    if target.exists() and not target.is_file():
        raise fail(f"{target}: {why_no_file(target)}; move it aside")
    if check:
        if not target.is_file():
            raise fail(f"params.yaml is missing: `ultraflux config compose --profile {profile}`", 1)
        # Bytes: what is no text differs, too.
        if target.read_bytes() != text.encode():
            raise fail(f"params.yaml differs from profile {profile}", 1)
        print(f"params.yaml is in step with profile {profile}")
        return
    write_text(target, text, follow=True)
    print(f"params.yaml written from profile {profile}")


@config_app.command("check")
def config_check() -> None:
    """Validate params.yaml."""
    from components.settings.schema import SettingsError, load_settings

    with refusing(SettingsError):
        settings = load_settings(project_root() / "params.yaml")
    print(f"params.yaml is valid (profile {settings.project.profile})")
    for stage, doubt in settings.doubts():
        print(f"warning: {stage}: {doubt}", file=sys.stderr)


@app.command(rich_help_panel=CORPUS)
def measure(
    paths: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Measure entropy, flatness, GLCM and compression of images with the official semantics."""
    from flows.commands.corpus.measure import measure_paths, measurement_table

    environment.prepare()
    failed = False
    rows = []
    for row in measure_paths(paths):
        failed = failed or "error" in row
        if as_json:
            print(json.dumps(row), flush=True)
        else:
            rows.append(row)
    if not as_json:
        measurement_table(rows)
    raise typer.Exit(2 if failed else 0)


@app.command(rich_help_panel=PIPELINE)
def promote(
    keep_baseline: Annotated[
        bool,
        typer.Option(
            "--keep-baseline",
            help="Also keep its scores in baselines/, for later candidates to be compared with.",
        ),
    ] = False,
    alias: Annotated[
        str | None,
        typer.Option(help="candidate or champion (default: promote.alias of the settings)."),
    ] = None,
) -> None:
    """Apply the gate's decision to the MLflow registry (exit code 1: the gate refused)."""
    from flows.tracking import promotion
    from flows.tracking.promotion import PromotionRefused

    if alias not in {None, "candidate", "champion"}:
        raise fail(f"--alias {alias}: choose candidate or champion")
    root = project_root()
    with refusing(PromotionRefused, code=1):
        if keep_baseline:
            # Before the registry is touched.
            promotion.judged_scores(root)
        print(promotion.promote_from_decision(root, alias))
        if keep_baseline:
            print(promotion.keep_baseline(root))


app.command(rich_help_panel=SERVICES)(services.sync)


@app.command(rich_help_panel=SERVICES)
def doctor(as_json: Json = False) -> None:
    """Say what is missing or broken on this machine, and how to fix it."""
    from flows.commands.services.doctor import examine, print_findings

    raise typer.Exit(print_findings(examine(project_root()), as_json=as_json))


for command in (services.up, services.down, services.status):
    app.command(rich_help_panel=SERVICES)(command)


def _add(panel: str, *modules: ModuleType) -> None:
    """A command of each module: its function of the module's own name."""
    for module in modules:
        name = module.__name__.rpartition(".")[2]
        epilog = getattr(module, "EPILOG", None)
        app.command(name, epilog=epilog, rich_help_panel=panel)(getattr(module, name))


_add(IMAGES, generate, ablate, judge, evaluate, sign, report)
_add(PIPELINE, sweep, history, compare, lineage, papers, verify, reproduce, plan)
_add(SERVICES, clean, chaos, remote, deploy, submit)
app.command(
    "select",
    epilog="Example: [bold]ultraflux select --what-if entropy_bits=6.8 "
    "--what-if aesthetic_top_fraction=0.4[/]",
    rich_help_panel=CORPUS,
)(corpus.select)


def main() -> None:
    """Entry point."""
    try:
        app()
    except Exception as problem:
        # What others refuse is said in their words; anything else is a fault of ours, with its
        # trace.
        refused = refusal(problem, sys.argv[1:])
        if refused is None:
            raise
        print(f"error: {legible(refused[0])}", file=sys.stderr)
        sys.exit(refused[1])
    except SystemExit as end:
        # Click takes the end of a file for a person's: it says "Aborted" and no more.
        aborted = end.__context__.__cause__ if end.__context__ is not None else None
        if aborted is not None and (cut := remove_cut_bytecode(aborted)) is not None:
            print(f"error: {describe_cut_bytecode(cut)}", file=sys.stderr)
        _leave_threads_behind(end.code)
        raise


def _leave_threads_behind(code: object) -> None:
    """End now where threads of Prefect's client wait for a server that has gone.

    Python joins them before it ends, and they try for minutes; all else has ended by now.
    """
    engine = sys.modules.get("flows.pipeline.prefect_flow")
    server = sys.modules.get("flows.services.embedded_prefect")
    lost = engine is not None and engine.server_lost.is_set()
    if lost or (server is not None and server.nobody_listens.is_set()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    main()
