"""The base autoencoder of a run: what post-training starts from and what encodes the corpus.

Both stages must hold the same weights: post-training changes the decoder only, so latents made
with the base encoder stay valid for the trained decoder.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from components.files.install_hints import download_command
from components.files.weight_folders import require_class, resolve_folder
from components.models.autoencoder_f16 import VAE_CLASSES, AutoencoderKLF16
from components.models.checkpoint_files import check_folder, require_finite
from components.models.tiny import build_tiny_autoencoder
from components.settings.models import AutoencoderSettings

_GET_FLUX_VAE = download_command(
    "black-forest-labs/FLUX.1-dev", "weights/FLUX.1-dev", include=("vae/*",)
)


def load_base_autoencoder(
    settings: AutoencoderSettings, seed: int, root: Path = Path()
) -> AutoencoderKLF16:
    """Load the pretrained folder, or build the tiny autoencoder, in float32 evaluation mode.

    Args:
        settings: `models.autoencoder`.
        seed: of the tiny autoencoder; without effect on a pretrained folder.
        root: repository root, where a relative `pretrained` starts.

    Returns:
        On the CPU, all parameters without gradient.

    Raises:
        WeightsMissing: the pretrained folder is not there or holds no safetensors.
        WeightsBroken: unreadable files, or tensors missing, unknown, misshapen or not finite.
        ValueError: the folder holds another class of model.
    """
    if settings.pretrained is None:
        autoencoder = build_tiny_autoencoder(
            block_out_channels=settings.tiny.block_out_channels,
            layers_per_block=settings.tiny.layers_per_block,
            norm_num_groups=settings.tiny.norm_num_groups,
            stride=settings.stride,
            decode_mode=settings.decode_mode,
            seed=seed,
        )
    else:
        folder = resolve_folder(root / settings.pretrained, "autoencoder", _GET_FLUX_VAE)
        require_class(folder, None, VAE_CLASSES)
        changes: dict[str, Any] = {"stride": settings.stride, "decode_mode": settings.decode_mode}
        # Before from_pretrained, which only warns about tensors that it does not find.
        check_folder(folder, AutoencoderKLF16, "autoencoder", **changes)
        autoencoder = AutoencoderKLF16.from_pretrained(
            folder,
            # Whatever the folder's dtype: the decoder is trained in float32, and the digest covers
            # the bytes.
            torch_dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            **changes,
        )
        require_finite(autoencoder, folder)
        # diffusers records the folder; a saved copy must not depend on where it was loaded.
        autoencoder.register_to_config(_name_or_path="")
    # Who trains the decoder switches its gradients on; nobody trains the encoder by accident.
    autoencoder.requires_grad_(False)
    return autoencoder.eval()


def encoder_digest(autoencoder: AutoencoderKLF16) -> str:
    """Sha256 of everything that determines normalised latents.

    Encoder weights by name, shape and bytes, and the configuration values stride, shift_factor and
    scaling_factor. Decoder post-training leaves it unchanged.
    """
    # What the decoder is does not matter here: latents stay valid while it is trained.
    config = autoencoder.config
    described = f"{config.stride} {config.shift_factor} {config.scaling_factor}"
    return _digest(autoencoder, described, ("encoder.", "quant_conv."))


def autoencoder_digest(autoencoder: AutoencoderKLF16) -> str:
    """Sha256 of everything that determines a reconstruction: all weights and the configuration."""
    # Private entries name versions and folders, which change no pixel.
    config = {k: v for k, v in autoencoder.config.items() if not k.startswith("_")}
    return _digest(autoencoder, json.dumps(config, sort_keys=True, default=str), ("",))


def _digest(autoencoder: AutoencoderKLF16, described: str, prefixes: tuple[str, ...]) -> str:
    digest = hashlib.sha256(described.encode())
    state = autoencoder.state_dict()
    # Sorted, and with shape and dtype before the bytes: no two different states write one stream.
    for name in sorted(state):
        if name.startswith(prefixes):
            tensor = state[name].detach().cpu().contiguous()
            digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            # As raw bytes: numpy has no bfloat16.
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
