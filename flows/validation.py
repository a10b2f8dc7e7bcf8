"""Data contracts with Great Expectations: our YAML in, stable JSON and an offline page out.

The context is ephemeral (nothing of Great Expectations is written to disk). Its own results hold
run ids and its documentation pages need a CDN, so both files here are our own: equal tables and
contracts give equal bytes.

A million rows take seconds because each column goes to the execution engine as a table of its own
(the engine copies its whole table for every metric), straight and not through a data source (which
hashes every value), in types that the engine compares without a Python call per value, and because
rows are listed for violated expectations only.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.files.page_templates import page_templates
from components.files.parquet_files import write_parquet
from components.files.whole_files import write_text
from components.settings.field_errors import first_error
from components.settings.schema import Settings

RESULTS_VERSION = 2
_EXAMPLES = 10
# Columns that name rows and say which of them count.
_ALWAYS_READ = ("image_id", "uri", "integrity", "kept", "channel")
# Distinct values in a sample of a thousand below which a text column is coded by value.
_FEW_VALUES = 200

FAILED_ROWS_SCHEMA = pa.schema(
    [
        ("contract", pa.string()),
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
    rows: Literal["kept", "all", "general", "human"] = "kept"
    """Which rows: all, the kept ones, or the kept ones of one channel. Before anything is selected
    every readable row counts as kept."""
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

    contract: str
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
    failed_rows: pa.Table = field(repr=False, compare=False)
    """Every violating row in table order, with `FAILED_ROWS_SCHEMA`."""

    @property
    def examples(self) -> list[dict[str, Any]]:
        """image_id, uri and value of the first violating rows."""
        shown = self.failed_rows.select(["image_id", "uri", "value"])
        return shown.slice(0, _EXAMPLES).to_pylist()


@dataclass(frozen=True)
class ValidationReport:
    """All outcomes of one or more contracts over one table, in their order."""

    contract: str
    """The last contract's name: the earlier ones must hold too."""
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
            f"{path.name}: contract not found; correct it under `validation` in params.yaml"
        ) from None
    except yaml.YAMLError as problem:
        raise ContractError(f"{path.name}: not YAML: {' '.join(str(problem).split())}") from None
    except ValidationError as problem:
        raise ContractError(f"{path.name}: {first_error(problem, verbatim=True)}") from None


def columns_read(contracts: Sequence[Contract]) -> list[str]:
    """Columns of a manifest that `validate` looks at, each once; the rest need not be loaded."""
    named = [spec.column for part in contracts for spec in part.expectations if spec.column]
    return list(dict.fromkeys([*_ALWAYS_READ, *named]))


def presence_read(contracts: Sequence[Contract]) -> list[str]:
    """Columns of which `validate` asks only whether there is a value, such as captions."""
    asked: dict[str, set[str]] = {}
    for spec in (spec for part in contracts for spec in part.expectations if spec.column):
        asked.setdefault(str(spec.column), set()).add(spec.expectation)
    # Captions are nine tenths of a manifest and are asked for nothing else.
    alone = {"expect_column_values_to_not_be_null"}
    return [name for name, kinds in asked.items() if kinds == alone and name not in _ALWAYS_READ]


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


def _evaluate(column: pd.DataFrame, expectations: list[Any], result_format: str) -> list[Any]:
    """Run expectations over a frame of one column (or none); results in the same order."""
    from great_expectations.execution_engine import PandasExecutionEngine
    from great_expectations.validator.validator import Validator

    engine = PandasExecutionEngine(batch_data_dict={"manifest": column})
    validator = Validator(execution_engine=engine)
    validator.metrics_calculator.show_progress_bars = False
    found = validator.graph_validate(
        configurations=[expectation.configuration for expectation in expectations],
        runtime_configuration={"result_format": result_format},
    )
    # The engine returns results grouped by metric, not in the order of the contract.
    by_position = {entry.expectation_config.meta["position"]: entry for entry in found}
    return [by_position[expectation.meta["position"]] for expectation in expectations]


def _results(column: pd.DataFrame, expectations: list[Any]) -> dict[int, Any]:
    """Results by position in the contract; violated ones with the positions of their rows."""
    entries = _evaluate(column, expectations, "BASIC")
    # One violating row in a million must not cost lists of indices for every other expectation.
    violated = [e for e, entry in zip(expectations, entries, strict=True) if not entry.success]
    complete = iter(_evaluate(column, violated, "COMPLETE") if violated else [])
    return {
        expectation.meta["position"]: entry if entry.success else next(complete)
        for expectation, entry in zip(expectations, entries, strict=True)
    }


def _column(frame: pd.DataFrame, name: str | None, rows: np.ndarray) -> pd.DataFrame:
    """One column of some rows, as cheap to compare as possible; without rows' other columns.

    Text with few distinct values becomes categorical: a comparison then costs one per value. Whole
    numbers become 64 bits wide: the engine compares narrower ones by a Python call per value.
    """
    if name is None or name not in frame.columns:
        return pd.DataFrame(index=pd.RangeIndex(len(rows)))
    values = frame[name].iloc[rows].reset_index(drop=True)
    if isinstance(values.dtype, np.dtype) and values.dtype.kind in "iu":
        return values.astype("int64").to_frame()
    is_text = not pd.api.types.is_numeric_dtype(values) and values.dtype != bool
    if is_text and values.iloc[:: max(1, len(values) // 1000)].nunique() < _FEW_VALUES:
        values = values.astype("category")
    return values.to_frame()


def _exception_message(info: dict[str, Any]) -> str | None:
    """First message of Great Expectations' exception record (flat, or one per metric)."""
    records = [info] if "raised_exception" in info else list(info.values())
    for record in records:
        if record.get("raised_exception"):
            return str(record.get("exception_message")).splitlines()[0]
    return None


def _failed_rows(
    spec: ExpectationSpec, contract: str, frame: pd.DataFrame, rows: np.ndarray
) -> pa.Table:
    """The given rows of the manifest in `FAILED_ROWS_SCHEMA`."""
    # Taking rows of a whole manifest copies its fifty columns, even when there are no rows.
    names = [n for n in dict.fromkeys(["image_id", "uri", spec.column]) if n in frame.columns]
    found = frame[names].iloc[rows]
    known = spec.column is not None and spec.column in frame.columns
    values = [None if pd.isna(v) else str(v) for v in found[spec.column]] if known else None
    same = {
        "contract": contract,
        "expectation": spec.expectation,
        "column": spec.column,
        "severity": spec.severity,
    }
    columns: list[Any] = [pa.repeat(pa.scalar(v, pa.string()), len(rows)) for v in same.values()]
    columns += [pa.Array.from_pandas(found[name], type=pa.string()) for name in ("image_id", "uri")]
    columns.append(pa.array(values or [None] * len(rows), type=pa.string()))
    return pa.Table.from_arrays(columns, schema=FAILED_ROWS_SCHEMA)


def _outcome(
    spec: ExpectationSpec,
    contract: str,
    arguments: dict[str, Any],
    entry: Any | None,
    frame: pd.DataFrame,
    rows: np.ndarray,
) -> Outcome:
    """What is told of one expectation; `entry` is None when its setting is null."""
    observed: str | None = "its setting is null"
    status: Literal["passed", "failed", "skipped"] = "skipped"
    failed = rows[:0]
    if entry is not None:
        status = "passed" if entry.success else "failed"
        value = entry.result.get("observed_value")
        message = _exception_message(entry.exception_info)
        if message is not None and spec.column is not None and spec.column not in frame.columns:
            message = f"column {spec.column!r} is missing"
        observed = message or (None if value is None else str(value))
        # An expectation with `mostly` may pass with exceptions; those are no failures.
        if not entry.success:
            failed = rows[np.sort(np.array(entry.result.get("unexpected_index_list") or [], int))]
    return Outcome(
        contract=contract,
        **spec.model_dump(exclude={"arguments"}),
        arguments=arguments,
        status=status,
        checked=len(rows),
        unexpected=len(failed),
        observed=observed,
        failed_rows=_failed_rows(spec, contract, frame, failed),
    )


def _scopes(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """Row positions by name of a scope."""
    decided = frame["kept"]
    # Before selection no row is judged; those that can be read are the ones that may be kept.
    judged = decided.eq(True) if decided.notna().any() else frame["integrity"].eq("ok")
    kept = judged.to_numpy(dtype=bool, na_value=False)
    human = frame["channel"].eq("human").to_numpy(dtype=bool, na_value=False)
    return {
        "all": np.arange(len(frame)),
        "kept": np.flatnonzero(kept),
        "general": np.flatnonzero(kept & ~human),
        "human": np.flatnonzero(kept & human),
    }


def validate(
    frame: pd.DataFrame, contracts: Sequence[Contract], settings: Settings
) -> ValidationReport:
    """Check a manifest against contracts.

    Args:
        frame: manifest rows with image_id, uri, integrity, kept and channel.
        contracts: what must hold, at least one.
        settings: where {setting: ...} values come from.

    Raises:
        ContractError: an expectation that does not exist, wrong arguments, or an unknown setting.
    """
    specs = [(part.name, spec) for part in contracts for spec in part.expectations]
    scopes = _scopes(frame)
    resolved: list[dict[str, Any]] = []
    groups: dict[tuple[str, str | None], list[Any]] = {}
    for position, (_, spec) in enumerate(specs):
        where = f"{spec.expectation} on {spec.column}"
        values = {k: _look_up(v, settings, where) for k, v in spec.arguments.items()}
        resolved.append(values)
        # A rule that is switched off (its setting is null) has nothing to hold rows against.
        if all(values[k] is not None or spec.arguments[k] is None for k in values):
            key = (spec.rows, spec.column)
            groups.setdefault(key, []).append(_build(spec, values, position))
    entries: dict[int, Any] = {}
    for (scope, column), expectations in groups.items():
        entries |= _results(_column(frame, column, scopes[scope]), expectations)
    outcomes = tuple(
        _outcome(spec, name, resolved[n], entries.get(n), frame, scopes[spec.rows])
        for n, (name, spec) in enumerate(specs)
    )
    return ValidationReport(contracts[-1].name, len(frame), len(scopes["kept"]), outcomes)


def to_json(report: ValidationReport) -> str:
    """Stable JSON: no times or run ids; at most ten examples per expectation."""
    expectations = []
    for outcome in report.outcomes:
        names = [item.name for item in fields(outcome) if item.name != "failed_rows"]
        entry = {name: getattr(outcome, name) for name in names}
        entry["examples"] = outcome.examples
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


def to_html(report: ValidationReport, rows_file: str = "failed_rows.parquet") -> str:
    """A self-contained page: no script, no font and no style from elsewhere.

    Args:
        report: what was found.
        rows_file: name of the table beside the page that lists every violating row.
    """
    template = page_templates(Path(__file__).parent / "templates").get_template(
        "validation.html.j2"
    )
    return template.render(report=report, rows_file=rows_file)


def failed_rows(report: ValidationReport) -> pa.Table:
    """Every violating row of every violated expectation; maybe none."""
    return pa.concat_tables(
        [FAILED_ROWS_SCHEMA.empty_table(), *(outcome.failed_rows for outcome in report.outcomes)]
    )


def write_report(
    report: ValidationReport, folder: Path, prefix: str = ""
) -> tuple[Path, Path, Path]:
    """Write results.json, report.html and failed_rows.parquet, each whole or not at all.

    Args:
        report: what was found.
        folder: where to.
        prefix: start of the three file names.
    """
    results, page, rows = (
        folder / f"{prefix}{name}"
        for name in ("results.json", "report.html", "failed_rows.parquet")
    )
    for path, text in ((results, to_json(report)), (page, to_html(report, rows.name))):
        write_text(path, text)
    write_parquet(failed_rows(report), rows)
    return results, page, rows
