"""Data contracts with Great Expectations: our YAML in, stable JSON and an offline page out.

The context is ephemeral (nothing of Great Expectations is written to disk). Its own results hold
run ids and its documentation pages need a CDN, so both files here are our own: equal tables and
contracts give equal bytes.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import jinja2
import pandas as pd
import pyarrow as pa
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.corpus.parquet_files import write_parquet
from components.settings import Settings

RESULTS_VERSION = 1
_EXAMPLES = 10

FAILED_ROWS_SCHEMA = pa.schema(
    [
        ("expectation", pa.string()),
        ("column", pa.string()),
        ("severity", pa.string()),
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("value", pa.string()),
    ]
)


class ContractError(ValueError):
    """A contract that cannot be used; the message names file, expectation and problem."""


class ExpectationSpec(BaseModel):
    """One expectation of a contract."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    expectation: str
    """Great Expectations' name, such as expect_column_values_to_be_unique."""
    column: str | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments; {setting: section.key, divide_by: number} is looked up in the settings."""
    severity: Literal["critical", "warning"]
    rows: Literal["kept", "all"] = "kept"
    why: str
    """Reason, shown in the report."""


class Contract(BaseModel):
    """A data contract."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1]
    name: str
    expectations: tuple[ExpectationSpec, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Outcome:
    """What one expectation found."""

    expectation: str
    column: str | None
    severity: str
    rows: str
    why: str
    arguments: dict[str, Any]
    status: Literal["passed", "failed", "skipped"]
    checked: int
    """Rows looked at."""
    unexpected: int
    """Rows that violate it (0 for a violated table expectation)."""
    observed: str | None
    """Observed value of a table expectation, or why it could not be evaluated."""
    failed_rows: tuple[dict[str, Any], ...] = field(repr=False)
    """image_id, uri and value of every violating row, in table order."""


@dataclass(frozen=True)
class ValidationReport:
    """All outcomes of one contract over one table, in the order of the contract."""

    contract: str
    row_count: int
    kept_count: int
    outcomes: tuple[Outcome, ...]

    def failures(self, severity: str) -> list[Outcome]:
        """Violated expectations of a severity."""
        return [o for o in self.outcomes if o.status == "failed" and o.severity == severity]


def load_contract(path: Path) -> Contract:
    """Read a contract.

    Raises:
        ContractError: missing, not YAML, or not of this form.
    """
    try:
        return Contract.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ContractError(
            f"{path.name}: contract not found; correct validation.contract"
        ) from None
    except yaml.YAMLError as problem:
        raise ContractError(f"{path.name}: not YAML: {' '.join(str(problem).split())}") from None
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ContractError(f"{path.name}: {where}: {first['msg']}") from None


def _look_up(value: Any, settings: Settings, where: str) -> Any:
    """Replace {setting: section.key, divide_by: n} by the value in the settings."""
    if not isinstance(value, dict) or "setting" not in value:
        return value
    found: Any = settings
    for part in str(value["setting"]).split("."):
        if not hasattr(found, part):
            raise ContractError(f"{where}: no setting {value['setting']!r}")
        found = getattr(found, part)
    # A division, as the manifest's columns are made: multiplying by 1e-6 could differ in a bit.
    return found / value["divide_by"] if found is not None and "divide_by" in value else found


def _build(spec: ExpectationSpec, arguments: dict[str, Any], position: int) -> Any:
    """The Great Expectations object of one entry."""
    import great_expectations.expectations as gxe

    class_name = "".join(part.capitalize() for part in spec.expectation.split("_"))
    known = {name.lower(): name for name in dir(gxe) if name.startswith("Expect")}
    if class_name.lower() not in known or spec.expectation == "expectation":
        snake = [re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() for name in known.values()]
        close = difflib.get_close_matches(spec.expectation, snake, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ContractError(f"unknown expectation {spec.expectation!r}{hint}")
    if spec.column is not None:
        arguments = {"column": spec.column, **arguments}
    try:
        return getattr(gxe, known[class_name.lower()])(
            **arguments, severity=spec.severity, meta={"position": position}
        )
    except (ValueError, TypeError) as problem:
        detail = " ".join(str(problem).split())
        raise ContractError(f"{spec.expectation} on {spec.column}: {detail}") from None


def _evaluate(frame: pd.DataFrame, expectations: list[Any], name: str) -> dict[int, dict[str, Any]]:
    """Run expectations over a frame; results by position in the contract."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("corpus").add_dataframe_asset(name)
    suite = context.suites.add(gx.ExpectationSuite(name=name, expectations=expectations))
    definition = gx.ValidationDefinition(
        name=name, data=asset.add_batch_definition_whole_dataframe("all"), suite=suite
    )
    context.validation_definitions.add(definition)
    result = definition.run(
        batch_parameters={"dataframe": frame}, result_format={"result_format": "COMPLETE"}
    )
    found = [entry.to_json_dict() for entry in result.results]
    return {entry["expectation_config"]["meta"]["position"]: entry for entry in found}


def _exception_message(info: dict[str, Any]) -> str | None:
    """First message of Great Expectations' exception record (flat, or one per metric)."""
    records = [info] if "raised_exception" in info else list(info.values())
    for record in records:
        if record.get("raised_exception"):
            return str(record.get("exception_message")).splitlines()[0]
    return None


def _outcome(
    spec: ExpectationSpec, arguments: dict[str, Any], entry: dict[str, Any], frame: pd.DataFrame
) -> Outcome:
    result = entry["result"]
    observed = result.get("observed_value")
    message = _exception_message(entry["exception_info"])
    if message is not None and spec.column is not None and spec.column not in frame.columns:
        message = f"column {spec.column!r} is missing"
    indices = sorted(result.get("unexpected_index_list") or [])
    rows = frame.loc[indices]
    values = rows[spec.column] if spec.column in frame.columns else [None] * len(rows)
    failed = tuple(
        {"image_id": image_id, "uri": uri, "value": None if pd.isna(value) else str(value)}
        for image_id, uri, value in zip(rows["image_id"], rows["uri"], values, strict=True)
    )
    return Outcome(
        **spec.model_dump(exclude={"arguments"}),
        arguments=arguments,
        status="passed" if entry["success"] else "failed",
        checked=len(frame),
        unexpected=0 if entry["success"] else len(failed),
        observed=message or (None if observed is None else str(observed)),
        # An expectation with `mostly` may pass with exceptions; those are no failures.
        failed_rows=() if entry["success"] else failed,
    )


def _skipped(spec: ExpectationSpec, arguments: dict[str, Any], checked: int) -> Outcome:
    return Outcome(
        **spec.model_dump(exclude={"arguments"}),
        arguments=arguments,
        status="skipped",
        checked=checked,
        unexpected=0,
        observed="its setting is null",
        failed_rows=(),
    )


def validate(frame: pd.DataFrame, contract: Contract, settings: Settings) -> ValidationReport:
    """Check a manifest against a contract.

    Args:
        frame: manifest rows with image_id, uri and kept.
        contract: what must hold.
        settings: where {setting: ...} values come from.

    Raises:
        ContractError: an expectation that does not exist, wrong arguments, or an unknown setting.
    """
    frame = frame.reset_index(drop=True)
    scopes = {"all": frame, "kept": frame[frame["kept"].eq(True)].reset_index(drop=True)}
    resolved: list[dict[str, Any]] = []
    skipped: set[int] = set()
    built: dict[str, list[Any]] = {"all": [], "kept": []}
    for position, spec in enumerate(contract.expectations):
        where = f"{spec.expectation} on {spec.column}"
        values = {k: _look_up(v, settings, where) for k, v in spec.arguments.items()}
        resolved.append(values)
        if any(values[k] is None and spec.arguments[k] is not None for k in values):
            skipped.add(position)
        else:
            built[spec.rows].append(_build(spec, values, position))
    entries: dict[int, dict[str, Any]] = {}
    for name, expectations in built.items():
        if expectations:
            entries |= _evaluate(scopes[name], expectations, name)
    outcomes = tuple(
        _skipped(spec, resolved[position], len(scopes[spec.rows]))
        if position in skipped
        else _outcome(spec, resolved[position], entries[position], scopes[spec.rows])
        for position, spec in enumerate(contract.expectations)
    )
    return ValidationReport(contract.name, len(frame), len(scopes["kept"]), outcomes)


def to_json(report: ValidationReport) -> str:
    """Stable JSON: no times or run ids; at most ten examples per expectation."""
    expectations = []
    for outcome in report.outcomes:
        entry = asdict(outcome)
        entry["examples"] = list(entry.pop("failed_rows")[:_EXAMPLES])
        expectations.append(entry)
    document = {
        "version": RESULTS_VERSION,
        "contract": report.contract,
        "rows": report.row_count,
        "kept": report.kept_count,
        "success": not report.failures("critical"),
        "critical_failures": len(report.failures("critical")),
        "warning_failures": len(report.failures("warning")),
        "expectations": expectations,
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def to_html(report: ValidationReport) -> str:
    """A self-contained page: no script, no font and no style from elsewhere."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("validation.html.j2").render(report=report, examples=_EXAMPLES)


def failed_rows(report: ValidationReport) -> pa.Table:
    """Every violating row of every violated expectation; maybe none."""
    rows = [
        {
            "expectation": outcome.expectation,
            "column": outcome.column,
            "severity": outcome.severity,
            **row,
        }
        for outcome in report.outcomes
        for row in outcome.failed_rows
    ]
    return pa.Table.from_pylist(rows, schema=FAILED_ROWS_SCHEMA)


def write_report(report: ValidationReport, folder: Path) -> tuple[Path, Path, Path]:
    """Write results.json, report.html and failed_rows.parquet, each whole or not at all."""
    paths = (folder / "results.json", folder / "report.html", folder / "failed_rows.parquet")
    for path, text in zip(paths[:2], (to_json(report), to_html(report)), strict=True):
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    write_parquet(failed_rows(report), paths[2])
    return paths
