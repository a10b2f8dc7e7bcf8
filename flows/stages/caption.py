"""Stage `caption`: join the captions that ship with the photographs and check them."""

from __future__ import annotations

from components.corpus.captions import STATUSES, join_captions, read_captions
from components.corpus.manifest import read_table, write_table
from components.corpus.sources import file_name, source_folder
from flows.stages.contract import StageContext, StageFailed, StageResult

_NAMED_IN_MESSAGES = 3


def run(context: StageContext) -> StageResult:
    """Write `data/caption/manifest.parquet`.

    Raises:
        StageFailed: captions file missing or wrong (with the line), or no row is left.
    """
    manifest = read_table(context.input("select", "manifest.parquet"))
    settings = context.settings.caption
    try:
        folder = source_folder(context.settings.ingest, context.root)
        files = manifest["uri"].map(lambda uri: file_name(uri, folder, context.root))
        captions = read_captions(folder / settings.file, set(files))
    except ValueError as problem:
        raise StageFailed(f"caption: {problem}") from None
    selected = manifest["kept"].eq(True)
    manifest = join_captions(manifest, files, captions, settings)
    path = context.output_dir / "manifest.parquet"
    write_table(manifest, path)

    kept = int(manifest["kept"].sum())
    lost = manifest[selected & ~manifest["kept"]]
    statuses = manifest.loc[selected, "caption_status"].value_counts()
    described = ", ".join(
        f"{files[index]}: {lost['caption_status'][index]}"
        for index in lost.index[:_NAMED_IN_MESSAGES]
    )
    if kept == 0:
        raise StageFailed(
            f"caption: none of {int(selected.sum())} selected images has a usable caption "
            f"({described}); correct {settings.file} or caption.min_words and max_words"
        )
    dropped = f", {len(lost)} without a usable caption ({described})" if len(lost) else ""
    return StageResult(
        metrics={
            "kept": float(kept),
            **{f"caption_{name}": float(statuses.get(name, 0)) for name in STATUSES},
        },
        datasets={"captioned": path},
        summary=f"{kept} captioned{dropped}",
    )
