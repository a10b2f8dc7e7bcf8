"""Captions by an image-text-to-text model of transformers from a local folder.

Stock classes alone (`AutoModelForImageTextToText`, `AutoProcessor`): Qwen-VL, LLaVA, SmolVLM and
their kin; code in a folder is never run. Pictures go through the engine in batches, on worker
processes or GPU actors, and every finished batch is kept: a run that was killed asks for none
twice. Decoding is greedy, so the same pictures in the same batches get the same words.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.chat.prompts import Prompt, clean_answer
from components.corpus.captions.checks import Written, check_english
from components.corpus.captions.spilled import Spilled
from components.corpus.derivatives import Derivative, derivative_ids, read_derivatives
from components.corpus.quality.scorer import model_limits
from components.engine.map_items import EngineLimits, code_digest, map_items
from components.files.install_hints import download_command
from components.files.weight_folders import WeightsMissing, folder_digest, resolve_folder
from components.images import decoding
from components.settings.captions import LocalCaptionSettings
from components.settings.schema import Settings

WHAT = "captioning model (caption.local.folder)"
COMMAND = download_command("Qwen/Qwen2.5-VL-7B-Instruct", "weights/Qwen2.5-VL-7B-Instruct")
"""An open model that fits one GPU of 24 GB; any other of its kind will do."""

_SCHEMA = pa.schema(
    [
        # Of the batch: a digest of its pictures' ids.
        pa.field("image_id", pa.string(), nullable=False),
        ("images", pa.list_(pa.string())),
        ("texts", pa.list_(pa.string())),
        # Whether the model ended by itself, before its limit of tokens.
        ("ended", pa.list_(pa.bool_())),
        ("error", pa.string()),
    ]
)


def check_folder(path: Path) -> Path:
    """The folder of the model, looked at before any worker starts.

    Raises:
        WeightsMissing: no weights, processor or chat template there; names the command for it.
    """
    folder = resolve_folder(path, WHAT, COMMAND)
    names = ("preprocessor_config.json", "processor_config.json")
    if not any((folder / name).is_file() for name in names):
        reason = "no preprocessor_config.json: not a model that looks at pictures"
        raise WeightsMissing(WHAT, folder, COMMAND, reason)
    return folder


class LocalCaptioner:
    """Model and processor of a folder."""

    def __init__(self, folder: Path, device: str) -> None:
        """Load; bfloat16 on a GPU, float32 elsewhere.

        Raises:
            WeightsMissing: a folder that cannot be loaded; says why.
        """
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        check_folder(folder)
        options = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._processor = AutoProcessor.from_pretrained(folder, **options)
            self._model, report = AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=torch.bfloat16 if device == "cuda" else torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
            lost = [*report["missing_keys"], *map(str, report["mismatched_keys"])]
            if lost:
                # transformers would leave them random, with a warning.
                raise ValueError(f"{len(lost)} parameters have no weights, first {min(lost)}")
            if not getattr(self._processor, "chat_template", None):
                raise ValueError("its processor has no chat template: a model that takes no prompt")
        except Exception as problem:
            # Whatever a damaged or foreign folder makes the libraries raise.
            reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
            raise WeightsMissing(f"usable {WHAT}", folder, COMMAND, reason) from None
        self._model = self._model.eval().to(device)
        tokenizer = self._processor.tokenizer
        # Answers are appended on the right, so that shorter prompts are filled up on the left.
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    def _ends(self) -> set[int]:
        """Tokens that end an answer."""
        ends = self._model.generation_config.eos_token_id
        ends = self._processor.tokenizer.eos_token_id if ends is None else ends
        return set(ends) if isinstance(ends, list) else {ends}

    def __call__(
        self, jpegs: Sequence[bytes], prompt: Prompt, max_new_tokens: int
    ) -> list[tuple[str, bool]]:
        """(text as the model wrote it, whether it ended before its limit) per picture.

        Raises:
            ImageUndecodable: a picture is damaged.
        """
        import torch
        from PIL import Image

        pictures = [Image.fromarray(decoding.decode_rgb(jpeg).pixels) for jpeg in jpegs]
        inputs = self._processor.apply_chat_template(
            [_conversation(picture, prompt) for picture in pictures],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        inputs = inputs.to(self._model.device, dtype=self._model.dtype)
        with torch.inference_mode():
            answer = self._model.generate(
                **inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens
            )
        new = answer[:, inputs["input_ids"].shape[1] :]
        texts = self._processor.batch_decode(new, skip_special_tokens=True)
        ends = self._ends()
        ended = [any(token in ends for token in row) for row in new.tolist()]
        return list(zip(texts, ended, strict=True))


def _conversation(picture: Any, prompt: Prompt) -> list[dict[str, Any]]:
    question = [{"type": "image", "image": picture}, {"type": "text", "text": prompt.text}]
    turns = [{"role": "user", "content": question}]
    if prompt.system:
        said = [{"type": "text", "text": prompt.system}]
        turns.insert(0, {"role": "system", "content": said})
    return turns


# Once per worker.
_load = cache(LocalCaptioner)


def caption_batch(
    batch: Sequence[Derivative], *, folder: Path, prompt: Prompt, max_new_tokens: int, device: str
) -> dict[str, Any]:
    """What the model says of a batch of derivatives, as a row of the engine."""
    answers = _load(folder, device)([one.jpeg for one in batch], prompt, max_new_tokens)
    return {
        "images": [one.image_id for one in batch],
        "texts": [text for text, _ in answers],
        "ended": [ended for _, ended in answers],
    }


@dataclass(frozen=True)
class LocalCaptions:
    """What a model on this machine wrote."""

    name: str
    """What the manifest names as author: folder, digest of the weights, version of the prompt."""
    written: Mapping[str, Written]
    """By image_id, on disk."""


@dataclass(frozen=True)
class _Job:
    """What all batches share."""

    folder: Path
    digest: str
    prompt: Prompt
    local: LocalCaptionSettings
    settings: Settings
    derivatives: Path
    state_dir: Path
    limits: EngineLimits

    def run(self, ids: Sequence[str], size: int) -> Iterator[dict[str, Any]]:
        """Rows of batches of `size` pictures, in order."""
        wanted = set(ids)
        pictures = (item for item in read_derivatives(self.derivatives) if item.image_id in wanted)
        device = self.settings.runtime.device
        function = partial(
            caption_batch,
            folder=self.folder,
            prompt=self.prompt,
            max_new_tokens=self.local.max_new_tokens,
            device=device,
        )
        shards = map_items(
            function,
            # Batches are the engine's items: their ids name what is in them, so that another
            # selection asks only for batches that are new.
            [_digest(group) for group in _batches(ids, size)],
            _batches(pictures, size),
            stage="caption" if size > 1 else "caption alone",
            key={
                "weights": self.digest,
                "prompt": [self.prompt.system, self.prompt.text],
                "max_new_tokens": self.local.max_new_tokens,
                "derivative_px": self.settings.signals.derivative_px,
                "device": device,
                "code": code_digest(decoding, *decoding.DECIDING_MODULES, sys.modules[__name__]),
            },
            schema=_SCHEMA,
            state_dir=self.state_dir,
            limits=self.limits,
            keep_items=True,
            outside=(WeightsMissing,),
        )
        for shard in shards:
            yield from pq.read_table(shard).to_pylist()


def _digest(ids: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch


def caption_locally(
    wanted: Collection[str],
    derivatives: Path,
    settings: Settings,
    prompt: Prompt,
    *,
    state_dir: Path,
    root: Path,
) -> LocalCaptions:
    """English captions of the derivatives in `wanted` by the model of `caption.local`.

    A batch that fails as a whole (a worker that runs out of memory, a picture that cannot be
    decoded) is repeated one picture at a time, so that only the culprit has no caption.

    Args:
        wanted: image_ids.
        derivatives: pictures, of the stage `signals`.
        settings: `caption.local` is set.
        prompt: what is asked.
        state_dir: finished batches; survives kills.
        root: where a relative folder starts.

    Raises:
        WeightsMissing: the model is not there, or cannot be loaded.
        ItemsFailed: workers could not load it; what was written is kept.
    """
    local = settings.caption.local
    assert local is not None, "the settings refuse the provider without it"
    folder = check_folder(root / local.folder)
    # Hashed once, here: 15 GB of weights take a minute.
    digest = folder_digest(folder)
    limits = model_limits(settings)
    job = _Job(folder, digest, prompt, local, settings, derivatives, state_dir, limits)
    # In the order of the derivatives, which are read as a stream beside them.
    ids = [image_id for image_id in derivative_ids(derivatives) if image_id in wanted]
    written = Spilled(Written)
    failed: list[str] = []
    for row, group in zip(
        job.run(ids, local.batch_size), _batches(ids, local.batch_size), strict=True
    ):
        if row["error"] is None:
            _judge(row, settings, written)
        elif len(group) == 1:
            written.add(group[0], Written(None, "error", row["error"]))
        else:
            failed += group
    for image_id, row in zip(failed, job.run(failed, 1) if failed else (), strict=True):
        if row["error"] is None:
            _judge(row, settings, written)
        else:
            written.add(image_id, Written(None, "error", row["error"]))
    return LocalCaptions(f"{folder.name} sha256:{digest}, prompt {prompt.version}", written)


def _judge(row: dict[str, Any], settings: Settings, written: Spilled[Written]) -> None:
    """Check the captions of one batch."""
    for image_id, answer, ended in zip(row["images"], row["texts"], row["ended"], strict=True):
        text = clean_answer(answer)
        # A text that ran into its limit may end in a full stop by chance.
        status = check_english(text, settings.caption)[0] if ended else "truncated"
        written.add(image_id, Written(text or None, status))
