"""Held-out photographs through an autoencoder and back, at native pixels of their bucket."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from components.images.arrays import ImageArray
from components.metrics.native.fidelity import nmse, psnr_db, ssim

if TYPE_CHECKING:
    from components.models.autoencoder_f16 import AutoencoderKLF16


FIDELITY_IDS = ("psnr_db", "ssim", "nmse")
"""What `fidelity_metrics` yields, in its order."""


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderKLF16, rgb: ImageArray) -> ImageArray:
    """Encode to the posterior's mode and decode, both in the autoencoder's own dtype and device.

    Args:
        autoencoder: in evaluation mode.
        rgb: uint8 (H, W, 3), edges multiples of the spatial compression.

    Returns:
        uint8 (H, W, 3), clipped and rounded as a saved file would be.
    """
    weight = next(autoencoder.parameters())
    pixels_BCHW = torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None].to(weight.device)
    scaled = (pixels_BCHW.to(torch.float32) / 127.5 - 1.0).to(weight.dtype)
    latents = autoencoder.encode(scaled).latent_dist.mode()
    decoded = autoencoder.decode(latents).sample[0].float()
    eight_bit = ((decoded + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    result: ImageArray = eight_bit.permute(1, 2, 0).contiguous().cpu().numpy()
    return result


def fidelity_metrics(reference: ImageArray, image: ImageArray) -> dict[str, float | None]:
    """PSNR, SSIM and NMSE by the ids of `components.metrics.cards`.

    Args:
        reference: uint8 (H, W, 3).
        image: uint8 (H, W, 3), the reconstruction.
    """
    return {
        "psnr_db": psnr_db(reference, image),
        "ssim": ssim(reference, image),
        "nmse": nmse(reference, image),
    }
