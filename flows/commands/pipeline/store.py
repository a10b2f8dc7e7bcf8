"""`ultraflux stores ...`: check latents and text embeddings, and repair a damaged shard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.command_line import fail, project_root, refuse_no_store, refusing
from flows.commands.tables import table_of, terminal

app = typer.Typer(no_args_is_help=True, help="Check and repair stores of latents and embeddings.")

_STORES = ("data/latents", "data/text_embeddings")
_SHOWN = 20


@app.command(epilog="Example: [bold]ultraflux stores verify data/latents[/]")
def verify(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Store folders; default: those of the last run.")
    ] = None,
) -> None:
    """Read every record and compare its hash (exit code 1: a record is damaged)."""
    root = project_root() if not paths else Path()
    otherwise = "not a finished store" if paths else "run the pipeline first: ultraflux run"
    for path in paths or [root / name for name in _STORES]:
        refuse_no_store(path, otherwise)
    from components.training.encoding.store_check import check_store

    rows, bad = [], []
    for path in paths or [root / name for name in _STORES]:
        with refusing(ValueError):
            found = check_store(path)
        rows.append(
            (
                path.name,
                str(found.shards),
                str(found.records),
                f"{found.nbytes / 1e9:.3f}",
                f"{found.nbytes / 1e6 / max(found.seconds, 1e-9):.0f}",
                str(len(found.bad)),
            )
        )
        bad += [(path.name, one) for one in found.bad]
    console = terminal()
    console.print(table_of(("store", "shards", "records", "GB", "MB/s", "bad"), rows))
    for name, one in bad[:_SHOWN]:
        image = one.image_id or "(empty prompt)"
        console.print(f"{name}: shard {one.shard}, image {image}: {one.problem}", soft_wrap=True)
    if bad:
        more = f" ({_SHOWN} shown)" if len(bad) > _SHOWN else ""
        raise fail(
            f"{len(bad)} damaged records{more}; `ultraflux stores rebuild SHARD` encodes a shard "
            "of latents again, `ultraflux stage run text_embeddings` the captions",
            1,
        )


@app.command(epilog="Example: [bold]ultraflux stores rebuild 512x1024-00000.bin[/]")
def rebuild(
    shard: Annotated[str, typer.Argument(help="File name, as `stores verify` prints it.")],
    store: Annotated[
        Path | None, typer.Option(help="Latent store; default: data/latents of the last run.")
    ] = None,
) -> None:
    """Encode one shard of latents again; it is replaced only if every hash is the index's."""
    root = project_root()
    folder = store or root / "data" / "latents"
    refuse_no_store(folder, "run the stage `latents` first")
    from components.files.weight_folders import WeightsMissing
    from components.settings.schema import load_settings
    from components.training.encoding.encoded_slices import ENCODED_SLICES, rebuild_from_slices
    from components.training.stores.latent_store import LatentStore, LatentStoreIncomplete

    with refusing(ValueError, OSError, WeightsMissing, LatentStoreIncomplete):
        settings = load_settings(root / "params.yaml")
        opened = LatentStore(folder)
        slices = [root / "data" / "slices" / name for name in ENCODED_SLICES]
        records = rebuild_from_slices(settings, slices, opened, shard, root=root)
    print(f"{shard}: {records} records encoded again, every hash as in the index")
