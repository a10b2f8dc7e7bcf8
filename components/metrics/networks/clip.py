"""Scores of contrastive encoders: CLIP score, PickScore and LAION aesthetics.

Stock transformers classes and nothing else: torchmetrics' CLIP score and the released scripts of
the others do not run on transformers 5. Text beyond the encoder's window (77 tokens) is cut off and
images are shrunk to 224 px (shorter edge, then the centre), so a long caption's end and the sides
of a wide picture are not seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.images.arrays import ImageArray

if TYPE_CHECKING:
    from components.metrics.metric import Picture

Scale = Literal["cosine", "logit"]

# Widths of improved-aesthetic-predictor's multilayer perceptron and where its layers stand.
_AESTHETIC_WIDTHS = (1024, 128, 64, 16, 1)
_AESTHETIC_INDICES = (0, 2, 4, 6, 7)


class ClipEncoder:
    """Unit vectors of images and texts by a CLIP model in a local folder."""

    def __init__(self, folder: Path, device: str, tokenizer_folder: Path | None = None) -> None:
        """Load.

        Args:
            folder: config.json, safetensors, and (unless given apart) tokenizer.json.
            device: where the network runs.
            tokenizer_folder: where tokenizer.json is, if elsewhere.

        Raises:
            ValueError: parameters without weights, which transformers would leave random.
        """
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

        loaded: Any = CLIPModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
        # transformers only warns about parameters that it leaves random.
        model, report = loaded
        absent = sorted(report["missing_keys"])
        if absent:
            raise ValueError(f"{folder}: {len(absent)} parameters have no weights, as {absent[0]}")
        # Checkpoints come in half precision too; a score must not depend on that.
        self.model = model.float().to(device).eval()
        self.device = device
        self.tokenizer: Any = CLIPTokenizerFast.from_pretrained(
            tokenizer_folder or folder, local_files_only=True
        )
        edge = self.model.config.vision_config.image_size
        # Every model used here was trained with CLIP's own processing; only the edge differs.
        self.processor: Any = CLIPImageProcessor(
            size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}
        )

    @torch.inference_mode()
    def image(self, rgb: ImageArray) -> Tensor:
        """(d,) float32 of length 1.

        Args:
            rgb: uint8 (H, W, 3).
        """
        from PIL import Image

        # As a PIL image: the released scorers decode with PIL and so resize 8-bit pixels.
        pixels = self.processor(images=Image.fromarray(rgb), return_tensors="pt")["pixel_values"]
        pooled = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
        # Of length 1, so that a product of two is their cosine.
        return F.normalize(self.model.visual_projection(pooled)[0], dim=0)

    @torch.inference_mode()
    def text(self, prompt: str) -> Tensor:
        """(d,) float32 of length 1; tokens beyond the window are cut off.

        Args:
            prompt: any length.
        """
        # The model's own window: a longer text would ask for positions that it has not learnt.
        window = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompt, truncation=True, max_length=window, return_tensors="pt")
        pooled = self.model.text_model(**tokens.to(self.device)).pooler_output
        return F.normalize(self.model.text_projection(pooled)[0], dim=0)


class PromptMetric:
    """CLIP score or PickScore: how near picture and prompt are (`metrics.ImageMetric`).

    - "cosine" (Hessel et al. 2021 as torchmetrics has it): max(100 cos, 0).
    - "logit" (Kirstain et al. 2023): the model's learnt temperature times cos.
    """

    def __init__(self, metric_id: str, encoder: ClipEncoder, scale: Scale, digest: str) -> None:
        """Keep the encoder.

        Args:
            metric_id: id of the card.
            encoder: with its weights.
            scale: what the cosine is multiplied with.
            digest: of the weights.
        """
        self.ids = (metric_id,)
        self.weights_digest = digest
        self._encoder, self._scale = encoder, scale

    def measure(self, rgb: ImageArray, picture: Picture) -> dict[str, float | None]:
        """See `ImageMetric.measure`."""
        from components.metrics.metric import prompt_of

        text = self._encoder.text(prompt_of(picture))
        cosine = float(self._encoder.image(rgb) @ text)
        # Clipped at 0 as torchmetrics has it; the logit is not, since only differences of it count.
        if self._scale == "cosine":
            return {self.ids[0]: max(100.0 * cosine, 0.0)}
        return {self.ids[0]: float(self._encoder.model.logit_scale.detach().exp()) * cosine}


class AestheticHead(nn.Module):
    """LAION's predictor: five linear layers without activations, on unit CLIP vectors.

    Args:
        width: of the vectors; 768 for ViT-L/14.
    """

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        widths = (width, *_AESTHETIC_WIDTHS)
        linears = {
            index: nn.Linear(widths[i], widths[i + 1]) for i, index in enumerate(_AESTHETIC_INDICES)
        }
        # Identities stand where the published numbering has dropout.
        self.layers = nn.Sequential(
            *(linears.get(i, nn.Identity()) for i in range(_AESTHETIC_INDICES[-1] + 1))
        )
        self.requires_grad_(False).eval()

    def forward(self, unit_vectors: Tensor) -> Tensor:
        """(..., width) to (...)."""
        score: Tensor = self.layers(unit_vectors)[..., 0]
        return score


class AestheticMetric:
    """LAION aesthetics (`metrics.ImageMetric`)."""

    def __init__(self, encoder: ClipEncoder, head: Mapping[str, Tensor], digest: str) -> None:
        """Load the head.

        Args:
            encoder: CLIP ViT-L/14.
            head: the published state dict, `layers.{0,2,4,6,7}.weight` and `.bias`.
            digest: of both files.

        Raises:
            RuntimeError: the state dict does not fit.
        """
        self.ids = ("laion_aesthetics",)
        self.weights_digest = digest
        self._encoder = encoder
        self._head = AestheticHead(encoder.model.config.projection_dim)
        # Strict: the width comes from the encoder, so a head of another CLIP is refused.
        self._head.load_state_dict(dict(head))
        self._head.to(encoder.device)

    @torch.inference_mode()
    def measure(self, rgb: ImageArray, picture: Picture) -> dict[str, float | None]:
        """See `ImageMetric.measure`; the picture beyond its pixels is not used."""
        return {"laion_aesthetics": float(self._head(self._encoder.image(rgb)))}
