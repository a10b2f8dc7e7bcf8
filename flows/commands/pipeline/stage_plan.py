"""The command `ultraflux stage plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.command_line import Json, fail, print_json, project_root, refusing
from flows.commands.tables import terminal

EPILOG = """Examples:

  ultraflux stage plan

  ultraflux stage plan --price-per-gpu-hour 3 --json

"may run": below a stage that runs; DVC skips it where its inputs turn out equal. `ultraflux plan`
shows this first, then what the settings cost by FLOPs, memory and disk."""


def stage_plan(
    price_per_gpu_hour: Annotated[
        float | None,
        typer.Option(help="Adds the cost of each stage (default: runtime.gpu_hour_price)."),
    ] = None,
    as_json: Json = False,
    mlflow: Annotated[
        bool, typer.Option("--mlflow/--no-mlflow", help="Ask the tracking server for runs too.")
    ] = True,
) -> None:
    """Say which stages the next run would compute, why, and how long they took in the past."""
    from components.settings.schema import SettingsError
    from flows.history.operations_plan import operations_summary, operations_table, plan_operations
    from flows.versioning.graph import GraphError

    if price_per_gpu_hour is not None and price_per_gpu_hour < 0:
        raise fail(f"--price-per-gpu-hour {price_per_gpu_hour}: must not be negative")
    with refusing(SettingsError, GraphError):
        made = plan_operations(project_root(), mlflow=mlflow)
    price = made.gpu_hour_price if price_per_gpu_hour is None else price_per_gpu_hour
    if as_json:
        print_json(made.as_dict(price))
        return
    console = terminal(highlight=False)
    console.print(operations_table(made, price))
    console.print(operations_summary(made, price), soft_wrap=True)
