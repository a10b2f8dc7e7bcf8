"""Stage `generate`: held-out captions to images, every size, with the trained models."""

from __future__ import annotations

from components.generation.held_out_images import NoCaptions, generate_held_out
from flows.stages.contract import StageContext, StageResult


def run(context: StageContext) -> StageResult:
    """Write `data/generate/{images/*.png, generations.jsonl, grid.png, twins/}`.

    Raises:
        StageFailed: a stage before this one has not run, or no held-out image has a caption.
    """
    settings = context.settings
    context.input("slices", "eval.parquet")
    if settings.generate.twins:
        context.input("slices", "stage1.parquet")
    context.input("vae", "autoencoder")
    context.input("dit_stage2", settings.generate.weights)
    # Finished images lie in the state: DVC empties the outputs before each run of a stage.
    finished = context.state_dir / "images"
    with context.failing(NoCaptions):
        images = generate_held_out(
            context.root, settings, finished=finished, description=context.stage
        )
    written = images.write(context.output_dir)
    count = len(images.generations)
    return StageResult(
        metrics={"images": float(count), "sizes": float(images.sizes)},
        artifacts=tuple(
            written[name] for name in ("grid.png", "images", "generations.jsonl", "twins")
        ),
        tags={f"sha256.{name}": digest for name, digest in images.digests.items()},
        summary=f"{count} images: {images.prompts} prompts at {images.sizes} sizes"
        + (f"; {len(images.twins)} from captions of training images" if images.twins else ""),
    )
