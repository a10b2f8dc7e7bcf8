"""Stage `text_embeddings`: T5 and CLIP embeddings of all English captions, for the backbone."""

from __future__ import annotations

from components.engine.ordered_pool import WorkersDoNotStart
from components.models.text_lengths import TextLength, describe
from components.training.encoding.embedded_captions import LENGTHS, embed_captions
from components.training.encoding.text_workers import EmbeddingFailed
from components.training.stores.text_store import EMPTY_PROMPT_ID
from flows.stages.contract import StageContext, StageFailed, StageResult


def run(context: StageContext) -> StageResult:
    """Write the text store, and in the tiny case the encoders, to `data/text_embeddings/`.

    Raises:
        StageFailed: a row has no caption, or the captions cannot be embedded.
        WeightsMissing: a part of the pretrained encoders is not there.
    """
    try:
        store = embed_captions(
            context.settings,
            context.input("slices", "manifest.parquet"),
            root=context.root,
            state_dir=context.state_dir,
            destination=context.output_dir,
        )
    except (ValueError, EmbeddingFailed, WorkersDoNotStart) as problem:
        raise StageFailed(f"text_embeddings: {problem}") from problem
    index = store.index
    captions = int(index["caption_sha256"].nunique())
    images = int((index["image_id"] != EMPTY_PROMPT_ID).sum())
    found = store.about["provenance"][LENGTHS]
    lengths = {name: TextLength(**one) for name, one in found.items()}
    cut = describe(lengths)
    return StageResult(
        metrics={
            "captions": float(captions),
            "images": float(images),
            **{f"captions_cut_{name.lower()}": float(one.cut) for name, one in lengths.items()},
        },
        datasets={"text_embeddings": context.output_dir / "index.parquet"},
        tags={
            "text_encoders.digest": str(index["encoder_digest"].iloc[0]),
            "text_embeddings.digest": store.digest,
        },
        summary=f"{captions} prompts, {store.tokens} tokens each"
        + (f"; warning: {cut} (models.text_encoders.max_sequence_length is T5's)" if cut else ""),
    )
