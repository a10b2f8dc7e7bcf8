"""HPSv3: human preference of a picture for its prompt (Ma et al. 2025).

Qwen2-VL-7B reads the picture (200,704 pixels at most), an instruction and the prompt; a small head
at one special token gives mean and log deviation of the preference, and the mean is the score. The
released code pins transformers 4.45; this is its arithmetic on stock classes of transformers 5:
positions count tokens one after another, without the picture's rows and columns, because the
released forward pass hands over embeddings alone.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from components.images.arrays import ImageArray
from components.metrics.networks.hpsv3_prompt import IMAGE_TOKEN, REWARD_TOKEN, conversation

if TYPE_CHECKING:
    from components.metrics.metric import Picture


CHECKPOINT = "HPSv3.safetensors"
PIXELS = 256 * 28 * 28
"""Of the picture that the network sees, at most; nearly as many for any shape."""
_HEAD = "rm_head."
# Saved by transformers before 4.52 ("visual.", "model.") or after ("model.visual.", ...).
_RENAMED = (
    (re.compile(r"^model\.(?=visual\.|language_model\.)"), ""),
    (re.compile(r"^model\."), "language_model."),
)


def reward_head(width: int) -> nn.Sequential:
    """The released head ("ranknet"): three linear layers in float32, to mean and log deviation.

    Args:
        width: of the backbone's states; 3,584 in the release.
    """
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.ReLU(),
        nn.Dropout(0.05),
        nn.Linear(1024, 16),
        nn.ReLU(),
        nn.Linear(16, 2),
    )


def backbone_key(key: str) -> str:
    """A checkpoint's parameter name as `Qwen2VLModel` of transformers 5 has it."""
    # The first that changes a name wins: "model.visual." must not become a language model's.
    for pattern, replacement in _RENAMED:
        renamed = pattern.sub(replacement, key)
        if renamed != key:
            return renamed
    return key


def fitted(rgb: ImageArray) -> Any:
    """A PIL image in multiples of 28 px, about `PIXELS` in all (PIL's bicubic).

    Args:
        rgb: uint8 (H, W, 3).

    Raises:
        ValueError: one edge is over 200 times the other.
    """
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    # Equal bounds, so that small pictures are enlarged as well: all have nearly as many tokens.
    height, width = smart_resize(*rgb.shape[:2], factor=28, min_pixels=PIXELS, max_pixels=PIXELS)
    return Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC)


class HpsV3:
    """The network in a local folder."""

    def __init__(self, checkpoint: Path, base: Path, device: str) -> None:
        """Load: bfloat16 on a GPU as released, float32 elsewhere.

        Args:
            checkpoint: HPSv3.safetensors.
            base: folder with Qwen2-VL-7B-Instruct's config.json and tokenizer.json.
            device: where the network runs.

        Raises:
            ValueError: the checkpoint does not fit the configuration or the tokenizer.
        """
        from safetensors.torch import load_file
        from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLModel

        self._device = device
        self._tokenizer: Any = Qwen2Tokenizer.from_pretrained(base, local_files_only=True)
        # One token more than Qwen's; its embedding is the last row of the released table.
        self._tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
        self._reward_id = int(self._tokenizer.convert_tokens_to_ids(REWARD_TOKEN))
        # `fitted` has resized already, with the filter of the release.
        self._processor: Any = Qwen2VLImageProcessor(do_resize=False)
        state = load_file(checkpoint)
        config: Any = Qwen2VLConfig.from_pretrained(base, local_files_only=True)
        # The release cut the embedding to the tokens that there are.
        config.text_config.vocab_size = len(self._tokenizer)
        # Taken out first: the backbone would call the head's parameters unknown.
        head = {key: state.pop(key) for key in list(state) if key.startswith(_HEAD)}
        # The reward is read off hidden states; no word is ever predicted.
        state.pop("lm_head.weight", None)
        loaded: Any = Qwen2VLModel.from_pretrained(
            None,
            config=config,
            state_dict={backbone_key(key): value for key, value in state.items()},
            dtype=torch.bfloat16 if device.startswith("cuda") else torch.float32,
            output_loading_info=True,
            # Reported instead of raised, so that the refusal below names the parameter.
            ignore_mismatched_sizes=True,
        )
        model, report = loaded
        _refuse_misfits(checkpoint, report)
        self._model: Any = model.to(device).eval()
        self._head = reward_head(config.text_config.hidden_size)
        try:
            self._head.load_state_dict(
                {key.removeprefix(_HEAD): value.float() for key, value in head.items()}
            )
        except RuntimeError as problem:
            reason = " ".join(str(problem).split())
            raise ValueError(f"{checkpoint}: not HPSv3's reward head: {reason}") from None
        self._head.to(device).eval()

    def inputs(self, rgb: ImageArray, prompt: str) -> tuple[Tensor, Tensor, Tensor]:
        """(ids (1, L), patches (P, 1176) float32, grid (1, 3)), on the CPU.

        Args:
            rgb: uint8 (H, W, 3).
            prompt: of the picture.

        Raises:
            ValueError: the prompt holds a control token, or the picture is too narrow.
        """
        pixels = self._processor(images=[fitted(rgb)], return_tensors="pt")
        grid = pixels["image_grid_thw"]
        # Patches are merged before the language model sees them, so the text holds fewer places.
        image_tokens = int(grid.prod()) // self._processor.merge_size**2
        text = conversation(prompt, image_tokens)
        ids: Tensor = self._tokenizer(text, return_tensors="pt")["input_ids"]
        image_id = self._tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        # A prompt with one of them would shift where the picture is put or the score is read.
        for token_id, wanted in ((self._reward_id, 1), (image_id, image_tokens)):
            if int((ids == token_id).sum()) != wanted:
                token = self._tokenizer.convert_ids_to_tokens(token_id)
                raise ValueError(f"the prompt holds the control token {token}; reword it")
        return ids, pixels["pixel_values"], grid

    @torch.inference_mode()
    def __call__(self, rgb: ImageArray, prompt: str) -> tuple[float, float]:
        """(mean, deviation) of the preference.

        Args:
            rgb: uint8 (H, W, 3).
            prompt: of the picture.

        Raises:
            ValueError: see `inputs`.
        """
        ids, patches, grid = (part.to(self._device) for part in self.inputs(rgb, prompt))
        model = self._model
        states = model.get_input_embeddings()(ids)
        seen = torch.cat(list(model.get_image_features(patches, grid).pooler_output)).to(states)
        is_image = (ids == model.config.image_token_id)[..., None].expand_as(states)
        # In order of position: the picture's tokens fill their places from left to right.
        states = states.masked_scatter(is_image, seen)
        hidden = model.language_model(inputs_embeds=states, use_cache=False).last_hidden_state
        # float32, in which the head was released; states are bfloat16 on a GPU.
        mean, log_deviation = self._head(hidden[ids == self._reward_id].float())[0].tolist()
        return mean, math.exp(log_deviation)


def _refuse_misfits(checkpoint: Path, report: dict[str, Any]) -> None:
    """Raise where transformers would leave parameters random."""
    wrong = sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"])))
    unknown = sorted(map(str, report["unexpected_keys"]))
    if wrong:
        raise ValueError(
            f"{checkpoint}: {len(wrong)} parameters are missing or have another shape than "
            f"config.json and tokenizer.json say, first {wrong[0]}"
        )
    if unknown:
        raise ValueError(f"{checkpoint}: {len(unknown)} unknown parameters, first {unknown[0]}")


class HpsV3Metric:
    """`metrics.ImageMetric` of both outputs."""

    def __init__(self, network: HpsV3, digest: str) -> None:
        """Keep the network.

        Args:
            network: with its weights.
            digest: of all files.
        """
        self.ids = ("hpsv3", "hpsv3_sigma")
        self.weights_digest = digest
        self._network = network

    def measure(self, rgb: ImageArray, picture: Picture) -> dict[str, float | None]:
        """See `ImageMetric.measure`."""
        from components.metrics.metric import prompt_of

        mean, deviation = self._network(rgb, prompt_of(picture))
        return {"hpsv3": mean, "hpsv3_sigma": deviation}
