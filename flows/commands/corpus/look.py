"""`ultraflux corpus look`: what training sees of photographs, as files to open."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.telemetry.wording import legible
from flows.commands.command_line import fail, project_root, refusing, why_no_file

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

    from components.training.encoding.training_view import TrainingView, TrainingViews

SHEET = "sheet.png"
_MANIFESTS = ("data/slices/manifest.parquet", "data/select/manifest.parquet")
_COLUMNS = ("image_id", "uri", "integrity", "kept", "duplicate_of", "bucket_height", "bucket_width")
_CELL_PX = 384
_SHEET_PX = 4096


def look(
    photos: Annotated[
        list[Path] | None,
        typer.Argument(help="Files, or rows of the manifest by image_id, path or file name."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")] = Path("look"),
    manifest: Annotated[
        Path | None,
        typer.Option(help="Rows to look up and to draw from; default: of the last run."),
    ] = None,
    number: Annotated[
        int, typer.Option("-n", min=0, help="Random rows on a contact sheet (sheet.png).")
    ] = 0,
) -> None:
    """Exactly what training sees: bucket crops, decoded latents, a sheet of random rows.

    NAME-IMAGEID.png is the crop as the encoder gets it (upright, sRGB, on white, resized to the
    bucket), NAME-IMAGEID-latent.png its latent through the base decoder, where there is one.
    """
    from components.settings.schema import load_settings

    if not photos and not number:
        raise fail("nothing to look at: name photographs, or give -n for random rows")
    root = project_root()
    with refusing(ValueError, OSError):
        settings = load_settings(root / "params.yaml")
        table = _table(root, manifest)
        if number and table is None:
            raise ValueError("-n: no manifest yet; run: ultraflux run --until select")
        unknown = [_unknown(photo, table, root) for photo in photos or []]
        if all(unknown) and not number:
            raise fail("\n".join(filter(None, unknown)), code=1)
        # After what can be said at once: it brings the models' libraries.
        from components.training.encoding.training_view import TrainingViews, random_rows

        views = TrainingViews(settings, root)
        out.mkdir(parents=True, exist_ok=True)
        problems = list(_write_photographs(photos or [], table, views, root, out))
        if number and table is not None:
            rows = random_rows(table, number, settings.project.seed)
            problems += _write_sheet(rows, views, out / SHEET)
            if rows.empty:
                problems.append("-n: the manifest has no photograph that is readable and kept")
    if problems:
        raise fail("\n".join(problems), code=1)


def _table(root: Path, manifest: Path | None) -> pd.DataFrame | None:
    """The manifest that is asked for, else the newest of the last run; None: there is none.

    Raises:
        ValueError: the one that is asked for is missing or none.
    """
    from components.corpus.manifest import read_table

    if manifest is not None:
        # As typed, or below the project.
        path = manifest if manifest.is_file() else root / manifest
        if not path.is_file():
            raise ValueError(f"--manifest {manifest}: {why_no_file(path)}")
        return read_table(path, _COLUMNS)
    present = [root / name for name in _MANIFESTS if (root / name).is_file()]
    return read_table(present[0], _COLUMNS) if present else None


def _unknown(photo: Path, table: pd.DataFrame | None, root: Path) -> str | None:
    """Why there is neither a file nor a row of that name, one line; None: there is."""
    from components.corpus.selection.why import find

    if photo.is_file():
        return None
    if table is None:
        return f"{photo}: {why_no_file(photo)}"
    try:
        find(table, photo.as_posix(), root)
    except ValueError as problem:
        named = str(problem)
        return named if named.startswith(f"{photo}") else f"{photo}: {named}"
    return None


def _view(
    photo: Path, table: pd.DataFrame | None, views: TrainingViews, root: Path
) -> TrainingView:
    """A file if there is one of that name; its row, if it has one, knows its bucket.

    Raises:
        ValueError: no pixels; one line.
    """
    from components.corpus.selection.why import find

    if photo.is_file():
        if table is not None:
            digest = hashlib.sha256(photo.read_bytes()).hexdigest()
            rows = table[table["image_id"].eq(digest)]
            if len(rows):
                return views.of_row(rows.iloc[0])
        return views.of_file(photo)
    assert table is not None, "asked before"
    return views.of_row(table.iloc[find(table, photo.as_posix(), root)])


def _write_photographs(
    photos: list[Path], table: pd.DataFrame | None, views: TrainingViews, root: Path, out: Path
) -> Iterator[str]:
    """Write each photograph's pictures; yields a line for each that cannot be had."""
    from PIL import Image

    for photo in photos:
        if (unknown := _unknown(photo, table, root)) is not None:
            yield unknown
            continue
        try:
            view = _view(photo, table, views, root)
        except ValueError as problem:
            named = str(problem)
            yield named if named.startswith(f"{photo}") else f"{photo}: {named}"
            continue
        print(legible(view.described()))
        stem = f"{Path(view.name).stem}-{view.image_id[:8]}"
        _save(Image.fromarray(view.crop), out / f"{stem}.png")
        if view.latent is not None:
            _save(Image.fromarray(view.latent), out / f"{stem}-latent.png")


def _write_sheet(rows: pd.DataFrame, views: TrainingViews, path: Path) -> list[str]:
    """Crops of rows, each with its decoded latent beside it; lines for those without pixels."""
    from PIL import Image

    from components.generation.contact_sheet import contact_sheet
    from components.images.decoding import ImageUndecodable
    from components.telemetry.progress import track

    cells: list[Image.Image] = []
    problems: list[str] = []
    for _, row in track(list(rows.iterrows()), "look"):
        try:
            view = views.of_row(row)
        except ImageUndecodable as problem:
            problems.append(f"{row['uri']}: {problem}")
            continue
        for pixels in (view.crop, view.latent):
            if pixels is not None:
                cell = Image.fromarray(pixels)
                # Small at once: a hundred crops in full are gigabytes.
                cell.thumbnail((_CELL_PX, _CELL_PX), Image.Resampling.LANCZOS)
                cells.append(cell)
    if cells:
        columns = min(8, len(cells))
        sheet = contact_sheet(cells, columns=columns, cell_px=_CELL_PX, max_px=_SHEET_PX)
        _save(sheet, path)
    return problems


def _save(image: Image.Image, path: Path) -> None:
    from components.files.whole_files import whole_file

    with whole_file(path) as temporary:
        image.save(temporary, format="PNG")
    print(legible(str(path)))
