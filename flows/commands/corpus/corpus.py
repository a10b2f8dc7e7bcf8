"""`ultraflux corpus ...` and `ultraflux select`: questions about a corpus and its versions."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.telemetry.wording import legible
from flows.commands.command_line import fail, print_json, project_root, refusing
from flows.commands.corpus import forget as forget_command
from flows.commands.corpus.look import look
from flows.commands.tables import table_of, terminal

if TYPE_CHECKING:
    import pandas as pd

    from components.corpus.pages.drift import FeatureDrift

app = typer.Typer(no_args_is_help=True, help="Compare and describe versions of the corpus.")

_SELECTED = "data/select/manifest.parquet"
_CAPTIONED = "data/caption/manifest.parquet"


@contextmanager
def version_file(root: Path, version: str, manifest: str) -> Iterator[Path]:
    """A manifest by path, or a copy of one by git revision, for the length of the block.

    Args:
        root: repository.
        version: a Parquet file, or a revision such as HEAD~1, a tag or a branch.
        manifest: the output that a revision stands for.

    Raises:
        ValueError: neither, or the version's manifest is not in the cache; one line.
    """
    if Path(version).is_file():
        yield Path(version)
        return
    if Path(version).suffix == ".parquet":
        raise ValueError(f"{version}: not found; make it with: ultraflux run")
    import dvc.api
    from dvc.exceptions import DvcException
    from dvc.scm import SCMError

    with tempfile.TemporaryDirectory(prefix="ultraflux-") as folder:
        copy = Path(folder) / "manifest.parquet"
        try:
            # Not into memory: a manifest of six million rows has gigabytes.
            with (
                dvc.api.open(manifest, repo=str(root), rev=version, mode="rb") as file,
                copy.open("wb") as target,
            ):
                shutil.copyfileobj(file, target, 2**20)
        except (DvcException, SCMError, OSError) as problem:
            detail = " ".join(str(problem).split())
            raise ValueError(
                f"{version}: neither a file nor a revision whose {manifest} is in the DVC cache "
                f"({detail}); try `dvc fetch`"
            ) from None
        yield copy


@contextmanager
def _version_files(before: str, after: str, manifest: str) -> Iterator[tuple[Path, Path]]:
    """Both versions; what is wrong with them ends the command with its one line."""
    root = project_root()
    with (
        refusing(ValueError),
        version_file(root, before, manifest) as old,
        version_file(root, after, manifest) as new,
    ):
        yield old, new


def _refuse_folder(output: Path) -> None:
    if output.is_dir():
        raise fail(f"--output {output}: a folder; name a file")


@app.command(
    "diff",
    epilog="Example: after a change of thresholds, [bold]ultraflux corpus diff HEAD~1 "
    "data/select/manifest.parquet --output changed.parquet[/]",
)
def corpus_diff(
    before: Annotated[str, typer.Argument(help="Parquet file or git revision.")],
    after: Annotated[str, typer.Argument(help="Parquet file or git revision.")],
    manifest: Annotated[
        str, typer.Option(help="What a revision stands for; see also data/caption.")
    ] = _SELECTED,
    output: Annotated[Path | None, typer.Option(help="Every differing row, as Parquet.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
) -> None:
    """What changed between two versions, row by row (exit code 1: something did)."""
    import pyarrow as pa

    from components.corpus.manifest_columns import ManifestOnDisk
    from components.corpus.pages.corpus_diff import DIFF_SCHEMA, VALUES_OF, diff
    from components.files.parquet_files import write_parquet

    with _version_files(before, after, manifest) as files:
        found = diff(*(ManifestOnDisk(file, VALUES_OF) for file in files))
    if output is not None:
        table = pa.Table.from_pandas(found.rows, schema=DIFF_SCHEMA, preserve_index=False)
        write_parquet(table.replace_schema_metadata(), output)
    if as_json:
        print_json(found.to_json(), default=str)
        raise typer.Exit(1 if len(found.rows) else 0)
    console = terminal()
    console.print(
        f"rows {found.rows_before} -> {found.rows_after}, "
        f"kept {found.kept_before} -> {found.kept_after}"
    )
    counts = [(change, str(number)) for change, number in found.counts().items()]
    console.print(table_of(("change", "rows"), counts))
    rules = [
        (change, reason, str(number))
        for change, reasons in found.by_rule().items()
        for reason, number in reasons.items()
    ]
    console.print(table_of(("change", "rule", "rows"), rules))
    columns = [(column, str(number)) for column, number in found.by_column().items()]
    console.print(table_of(("column", "rows that differ"), columns))
    raise typer.Exit(1 if len(found.rows) else 0)


@app.command(
    epilog="Example: [bold]ultraflux corpus drift v1 HEAD --output drift.html[/] compares the "
    "captioned corpus of tag v1 with that of the last commit.",
)
def drift(
    before: Annotated[str, typer.Argument(help="Parquet file or git revision.")],
    after: Annotated[str, typer.Argument(help="Parquet file or git revision.")],
    manifest: Annotated[str, typer.Option(help="What a revision stands for.")] = _CAPTIONED,
    output: Annotated[Path, typer.Option(help="HTML page; JSON beside it.")] = Path("drift.html"),
) -> None:
    """Compare distributions of two versions.

    Something has drifted or shifted when a difference passes its bound (PSI 0.25 or 0.1, KS 0.1 or
    0.05) and is significant for the number of rows: p at most 0.05 after Holm's correction over
    all tests. A difference that passes its bound among too few rows to tell is named as such.

    Exit codes: 0 nothing has drifted (there may be shifts, or too few rows to tell), 1 something
    has drifted, 2 a version cannot be read.
    """
    from components.corpus.manifest_columns import read_columns
    from components.corpus.pages.drift import COLUMNS, drift_page, measure_drift
    from components.corpus.pages.page_figures import write_page

    _refuse_folder(output)
    if output.suffix == ".json":
        raise fail(f"--output {output}: name the page, such as drift.html; JSON goes beside it")
    with _version_files(before, after, manifest) as files:
        old, new = (read_columns(file, COLUMNS, kept_only=True) for file in files)
    report = measure_drift(old, new)
    write_page(drift_page(report, old, new), output, follow=True)
    document = json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_page(document, output.with_suffix(".json"))
    for feature in report.features:
        if feature.status != "stable":
            print(_described(feature))
    rows = f"{report.rows_before} rows before, {report.rows_after} after"
    if report.status == "too_few_rows":
        print(f"too few rows to tell ({rows}): {output}")
    else:
        print(f"{report.status} ({rows}): {output}")
    raise typer.Exit(1 if report.status == "drifted" else 0)


def _described(feature: FeatureDrift) -> str:
    """One line: how far the feature moved, and how likely that is by chance."""
    named = {
        "PSI": feature.psi,
        "KS": feature.ks,
        "missing": abs(feature.missing_after - feature.missing_before) or None,
        "p": feature.p_value,
    }
    sizes = ", ".join(f"{name} {value:.2g}" for name, value in named.items() if value is not None)
    status = feature.status.replace("_", " ")
    note = f"; {feature.note}" if feature.note else ""
    return f"{status:<13}{feature.name}: {sizes}{note}"


@app.command(
    epilog="Example: [bold]ultraflux corpus datasheet HEAD --output datasheet.html[/]; without "
    "arguments it describes what the stage slices has just written.",
)
def datasheet(
    version: Annotated[str, typer.Argument(help="Parquet file or git revision.")] = (
        "data/slices/manifest.parquet"
    ),
    output: Annotated[Path, typer.Option(help="HTML page.")] = Path("datasheet.html"),
) -> None:
    """Describe a sliced corpus: counts, shapes, scores, licences, attribution, losses."""
    from components.corpus.manifest_columns import read_columns
    from components.corpus.pages import datasheet as page
    from components.corpus.pages.page_figures import write_page
    from components.corpus.selection import slices
    from components.settings.schema import load_settings

    _refuse_folder(output)
    root = project_root()
    columns = [*slices.COLUMNS, *page.COLUMNS]
    with refusing(ValueError):
        settings = load_settings(root / "params.yaml")
        with version_file(root, version, "data/slices/manifest.parquet") as file:
            table = read_columns(file, columns, presence=page.PRESENCE)
    rows = slices.slice_rows(table, settings.slices, settings.project.seed)
    text = page.datasheet_page(table, rows, _coverage(root, version))
    write_page(text, output, follow=True)
    print(output)


def _coverage(root: Path, version: str) -> dict[str, Any] | None:
    """What `ingest` says of the source of a version; None where it cannot be had."""
    path = version
    if Path(version).is_file():
        # Of data/slices/manifest.parquet, in this project or another: data/ingest/coverage.json.
        path = str(Path(version).resolve().parents[1] / "ingest" / "coverage.json")
        if not Path(path).is_file():
            return None
    try:
        with version_file(root, path, "data/ingest/coverage.json") as file:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return found


@app.command(
    epilog="Example: [bold]ultraflux corpus why lake.jpg --out why.html[/] shows the picture "
    "beside the one that was kept in its place.",
)
def why(
    image: Annotated[
        str, typer.Argument(help="image_id, the beginning of one, path, file name or address.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Also the pictures side by side: .html or .png.")
    ] = None,
) -> None:
    """Why a photograph is kept or dropped: each rule's value against its threshold."""
    from components.corpus.manifest_columns import read_columns
    from components.corpus.pages.why_page import write_why
    from components.corpus.selection.rights import Exclusions
    from components.corpus.selection.rules import COLUMNS
    from components.corpus.selection.why import explain, find, with_later_stages
    from components.settings.schema import load_settings

    root = project_root()
    path = root / _SELECTED
    if not path.is_file():
        raise fail(f"{_SELECTED}: not found; run the pipeline first: ultraflux run --until select")
    # QuotaInfeasible and ImageUnknown are ValueErrors too; all are one line.
    with refusing(ValueError, OSError):
        settings = load_settings(root / "params.yaml")
        # A column of addresses is large, and no other name needs it.
        also = Exclusions.COLUMNS if "://" in image else ("uri",)
        table = read_columns(path, [*COLUMNS, *also, "reject_reason"])
        found = explain(table, find(table, image, root), settings)
        found = with_later_stages(found, root / "data")
        print("\n".join(found.lines()))
        if out is not None:
            write_why(found, root / "data" / "signals" / "derivatives.parquet", out)
    if out is not None:
        print(out)


app.command(
    "look",
    epilog="Example: [bold]ultraflux corpus look holiday.jpg -n 24 --out look[/] writes the crop "
    "that the encoder would get of it, and a sheet of 24 random rows of the corpus.",
)(look)
app.command("forget", epilog=forget_command.EPILOG)(forget_command.forget)


@app.command()
def pack(
    manifest: Annotated[
        Path | None, typer.Option(help="Other rows than `images.rows` says: a manifest.")
    ] = None,
    track: Annotated[bool, typer.Option(help="Also `dvc add` the store.")] = True,
) -> None:
    """Pack original photographs by content address into data/images, for DVC's remotes."""
    from components.corpus.image_packing import pack_images
    from components.images.image_store import FOLDER
    from components.images.original_lookup import OriginalLookup
    from components.settings.schema import load_settings
    from flows.versioning import graph as versioning

    root = project_root()
    with refusing(ValueError):
        settings = load_settings(root / "params.yaml").images
        rows = _rows_to_pack(root, settings.rows, manifest)
        report = pack_images(
            OriginalLookup(root).find_each(rows),
            root / FOLDER,
            shard_digits=settings.shard_digits,
        )
    print(
        f"{report.images} originals ({report.total_bytes / 1e6:.1f} MB) in {report.shards} shards, "
        f"{report.written} of them new"
    )
    if track:
        with refusing(ValueError):
            versioning.add(root, FOLDER)
        print(f"git add {FOLDER}.dvc, then `dvc push {FOLDER}`")
    if report.unreadable:
        name, reason = next(iter(report.unreadable.items()))
        raise fail(
            f"{len(report.unreadable)} originals could not be packed, the first is {name}: "
            f"{reason}; bring them back and pack again",
            code=1,
        )


def _rows_to_pack(root: Path, which: str, manifest: Path | None) -> pd.DataFrame:
    """image_id and uri of the originals that the store shall hold.

    Raises:
        ValueError: no such manifest, or no row is left.
    """
    from components.corpus.manifest import read_table

    path = manifest or Path("data", "slices" if which == "kept" else "ingest", "manifest.parquet")
    if not (root / path).is_file():
        raise ValueError(f"{path}: not found; run the pipeline first: ultraflux run")
    table = read_table(root / path, ["image_id", "uri", "integrity", "duplicate_of", "kept"])
    wanted = (table["integrity"] == "ok") & table["duplicate_of"].isna()
    # Null before the select stage: nothing is decided yet.
    if table["kept"].notna().any():
        wanted = table["kept"].eq(True)
    if not wanted.any():
        raise ValueError(f"{path}: no row to pack")
    return table.loc[wanted, ["image_id", "uri"]]


def select(
    what_if: Annotated[
        list[str],
        typer.Option(metavar="KEY=VALUE", help="Another value of a selection setting; repeatable."),
    ],
    manifest: Annotated[Path, typer.Option(help="A selected manifest.")] = Path(_SELECTED),
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
) -> None:
    """What other thresholds would keep, from the measured signals alone."""
    from components.corpus.manifest_columns import read_columns
    from components.corpus.selection import what_if as question
    from components.corpus.selection.rules import COLUMNS
    from components.settings.schema import load_settings

    root = project_root()
    path = manifest if manifest.is_absolute() else root / manifest
    if not path.is_file():
        raise fail(f"{manifest}: not found; run the pipeline first: ultraflux run")
    with refusing(ValueError):
        settings = load_settings(root / "params.yaml")
        changed = question.changed_settings(settings.select, what_if)
        table = read_columns(path, [*COLUMNS, "uri", "reject_reason"])
        found = question.what_if(table, settings.select, changed, settings.project.seed)
    document = question.to_json(found, what_if)
    if as_json:
        print_json(document, default=str)
        return
    counts = (
        (name, str(number), str(then), f"{then - number:+d}" if then != number else "")
        for name, number in found.now.items()
        for then in (found.then[name],)
    )
    console = terminal()
    console.print(table_of(("", "now", "then", "change"), counts))
    for kind, word in (("gained", "newly kept"), ("lost", "newly rejected")):
        console.print(f"{document[kind]} {word}")
        for row in document[f"{kind}_examples"]:
            console.print(
                f"  {legible(row['uri'])}: {row['reject_reason']} {row['reject_value']} "
                f"against {row['reject_threshold']}",
                markup=False,
            )
