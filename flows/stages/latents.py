"""Stage `latents`: encode training and held-out photographs with the frozen base encoder."""

from __future__ import annotations

from components.engine.ordered_pool import WorkersDoNotStart
from components.files.weight_folders import WeightsMissing
from components.training.encoding.encoded_slices import ENCODED_SLICES, encode_slices
from components.training.encoding.latent_summary import write_summary
from flows.stages.contract import StageContext, StageFailed, StageResult


def run(context: StageContext) -> StageResult:
    """Write `data/latents/`: index.parquet and shards, summary.json, bands.csv, bands.png.

    Raises:
        StageFailed: no images, an image in two splits, weights are missing, or more photographs
            than the settings allow cannot be encoded.
    """
    folder = context.output_dir
    try:
        store = encode_slices(
            context.settings,
            [context.input("slices", name) for name in ENCODED_SLICES],
            root=context.root,
            state_dir=context.state_dir,
            destination=folder,
        )
    except (ValueError, WeightsMissing, WorkersDoNotStart) as problem:
        raise StageFailed(f"latents: {problem}") from problem
    summary = write_summary(store, folder)
    return StageResult(
        metrics={name: float(v) for name, v in summary.items() if isinstance(v, (int, float))},
        artifacts=(folder / "bands.png", folder / "summary.json"),
        datasets={"latents": folder / "index.parquet"},
        tags={"latents.digest": store.digest, "latents.encoder": summary["encoder_digest"]},
        summary=(
            f"{len(store)} latents in {summary['buckets']} buckets, {summary['mib']:.2f} MiB, "
            f"mean {summary['latent_mean']:+.2f}, spread {summary['latent_std']:.2f}"
        ),
    )
