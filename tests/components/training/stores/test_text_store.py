from __future__ import annotations

import hashlib

import pytest
import torch

from components.training.stores.text_store import (
    EMPTY_PROMPT_ID,
    TextStore,
    TextStoreIncomplete,
    build_text_store,
    caption_sha256,
    embedded_prompts,
)

CAPTIONS = {"b": "two dogs", "a": "one cat", "c": "two dogs"}


def embed(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.tensor([float(len(prompt)) for prompt in prompts])
    return numbers[:, None, None].expand(-1, 3, 2), numbers[:, None].expand(-1, 4)


def build(root, captions=CAPTIONS, encode=embed, **options):
    options = {"encoder_digest": "e", "dtype": "float32", "batch_size": 2, **options}

    def here(plan):
        return (embedded_prompts(prompts, encode, options["dtype"]) for prompts in plan)

    return build_text_store(root / "work", root / "store", captions, here, **options)


def contents(root) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((root / "store").iterdir())
    }


def test_embeddings_come_back_by_image_id_with_the_empty_prompt(tmp_path):
    store = build(tmp_path)
    assert set(store.index["image_id"]) == {"a", "b", "c", EMPTY_PROMPT_ID}
    for image_id, caption in {**CAPTIONS, EMPTY_PROMPT_ID: ""}.items():
        t5, pooled = store.read(image_id)
        assert torch.equal(t5, torch.full((3, 2), float(len(caption))))
        assert torch.equal(pooled, torch.full((4,), float(len(caption))))
    assert store.widths == (2, 4)


def test_equal_captions_share_a_record_and_hashes_are_those_of_the_text(tmp_path):
    index = build(tmp_path).index.set_index("image_id")
    where = ["shard", "offset", "xxh64"]
    assert tuple(index.loc["b", where]) == tuple(index.loc["c", where])
    assert index.loc["a", "caption_sha256"] == hashlib.sha256(b"one cat").hexdigest()
    assert caption_sha256("é") == hashlib.sha256("é".encode()).hexdigest()


def test_an_interrupted_build_encodes_only_what_is_missing_and_ends_with_the_same_bytes(tmp_path):
    build(tmp_path / "undisturbed")
    calls = []

    def stops(prompts):
        calls.append(list(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return embed(prompts)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "killed", encode=stops)
    calls.clear()

    def goes_on(prompts):
        calls.append(list(prompts))
        return embed(prompts)

    build(tmp_path / "killed", encode=goes_on)
    assert calls == [["two dogs"]]
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    "change",
    [{"encoder_digest": "other"}, {"dtype": "bfloat16"}, {"captions": {**CAPTIONS, "a": "a cow"}}],
)
def test_another_encoder_precision_or_caption_is_encoded_again(tmp_path, change):
    first = build(tmp_path).digest
    calls = []

    def counted(prompts):
        calls.append(prompts)
        return embed(prompts)

    assert build(tmp_path, encode=counted, **change).digest != first
    assert calls


def test_bfloat16_is_stored_in_half_the_space_and_read_as_float32(tmp_path):
    store = build(tmp_path, dtype="bfloat16")
    assert store.read("a")[0].dtype == torch.float32


def test_a_folder_without_index_is_named_with_the_stage_to_run(tmp_path):
    with pytest.raises(TextStoreIncomplete, match="text_embeddings"):
        TextStore(tmp_path)


def test_an_unknown_image_is_named(tmp_path):
    with pytest.raises(KeyError, match="nobody"):
        build(tmp_path).read("nobody")


def test_an_embedding_that_is_not_finite_is_refused(tmp_path):
    def broken(prompts):
        t5, pooled = embed(prompts)
        return t5 * float("nan"), pooled

    with pytest.raises(ValueError, match="not finite"):
        build(tmp_path, encode=broken)
