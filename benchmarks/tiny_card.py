"""What the profile of one card takes, small and random: a rehearsal on any machine.

python benchmarks/tiny_card.py

Writes weights/FLUX.1-dev and puts the values of conf/tiny_card.yaml into
conf/profiles/single-gpu.yaml. Classes, file names and configurations of the weights are those of
the published folder (stock diffusers, F8 autoencoder, guidance input); widths are small and nothing
was trained: pictures are noise.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CAPTIONS = ("A frozen lake between mountains at dawn.", "Red leaves on wet stones.")
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
"""As the published folder has it."""
INDEX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
"""Likewise: what `FluxPipeline.from_pretrained` loads."""


def write_tiny_flux(folder: Path, *, width: int = 32, seed: int = 0) -> None:
    """Write all parts of a FLUX.1-dev folder.

    Args:
        folder: is made; `transformer`, `vae`, `text_encoder(_2)`, `tokenizer(_2)`, `scheduler`
            and model_index.json.
        width: of both text encoders' outputs.
        seed: of the transformer's weights.
    """
    import torch
    from diffusers import FluxTransformer2DModel

    from components.models.text_encoders import build_tiny_text_encoders

    build_tiny_text_encoders(folder, CAPTIONS, t5_dim=width, clip_dim=width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=width,
            pooled_projection_dim=width,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        )
    transformer.save_pretrained(folder / "transformer")
    write_stock_autoencoder(folder / "vae")
    for name, values in (("scheduler/scheduler_config", SCHEDULER), ("model_index", INDEX)):
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_stock_autoencoder(folder: Path) -> None:
    """Write a tiny F8 autoencoder of the stock class, by the stock class."""
    from diffusers import AutoencoderKL

    from components.models.tiny import build_tiny_autoencoder

    ours = build_tiny_autoencoder(stride=1)
    # What the F16 class adds to a stock configuration.
    added = ("stride", "decode_mode")
    config = {k: v for k, v in ours.config.items() if k not in added and not k.startswith("_")}
    stock = AutoencoderKL(**config)
    stock.load_state_dict(ours.state_dict())
    stock.save_pretrained(folder)


def make_small(project: Path) -> None:
    """Put the values of conf/tiny_card.yaml into a project's profile of one card."""
    from omegaconf import OmegaConf

    profile = project / "conf" / "profiles" / "single-gpu.yaml"
    small = OmegaConf.load(project / "conf" / "tiny_card.yaml")
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(profile), small), profile)


if __name__ == "__main__":
    project = Path.cwd()
    weights = project / "weights" / "FLUX.1-dev"
    if weights.exists():
        sys.exit(f"error: {weights} is there already: nothing is written over weights")
    write_tiny_flux(weights)
    make_small(project)
    print(f"{weights}: random weights; {project / 'conf/profiles/single-gpu.yaml'}: small")
