"""What rounding a frozen base to 8 or 4 bits changes, measured before training on it begins.

Velocities of the unrounded and the rounded network on one held-out image at the eight noise levels
of validation, and one picture of each from the same noise. Measured once for a base, a kind and a
precision; the numbers stand in the run's metrics and in the model card.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from components.files.whole_files import write_text
from components.models.backbones import backbone_of
from components.training.dit.curriculum import keyed_generator
from components.training.dit.validation import LEVELS, NOISE_LEVELS

if TYPE_CHECKING:
    from components.images.arrays import ImageArray
    from components.training.dit.job import DitJob

FILE = "base_rounding.json"
# Below the streams of training, validation and sample grids: noise that nothing else draws.
_STREAM = -2 - LEVELS
_STEPS = 8
"""Euler steps of the picture."""
_EDGE = 64
"""Latent pixels at most: 1024 px in a grid of 16."""


@dataclass(frozen=True)
class BaseRounding:
    """Errors of a rounded network against the same one unrounded."""

    kind: str
    """Value of `models.transformer.quantisation`."""
    dtype: str
    """In which both computed."""
    base: str
    """Identity of the weights, or the seed of random ones."""
    velocity: tuple[float, ...]
    """||v_rounded - v|| / ||v|| at each of `NOISE_LEVELS`."""
    psnr_db: float | None
    """Between the two pictures; infinite for equal ones. None: there was no autoencoder."""
    size: tuple[int, int]
    """Latent (height, width) of both."""

    @property
    def worst(self) -> float:
        """Largest of the velocity errors."""
        return max(self.velocity)

    def metrics(self) -> dict[str, float]:
        """For the record of a run."""
        found = {
            "rounding_velocity_error_worst": self.worst,
            "rounding_velocity_error_mean": sum(self.velocity) / len(self.velocity),
        }
        if self.psnr_db is not None and math.isfinite(self.psnr_db):
            found["rounding_picture_psnr_db"] = self.psnr_db
        return found

    def described(self) -> str:
        """Markdown for a model card."""
        levels = "".join(
            f"| {level:g} | {error:.3%} |\n"
            for level, error in zip(NOISE_LEVELS, self.velocity, strict=True)
        )
        picture = (
            "no picture was made (no autoencoder)"
            if self.psnr_db is None
            else f"a picture from the same noise in {_STEPS} steps has PSNR {self.psnr_db:.2f} dB"
        )
        h, w = self.size
        return (
            f"The frozen weights were held as `{self.kind}` while the adapter was trained; what "
            "is exported is the adapter on the unrounded weights. Rounding alone changes the "
            f"velocity of a held-out image ({h}x{w} latents, {self.dtype}) by the relative RMS "
            f"below, and {picture}.\n\n| noise level t | error |\n|---:|---:|\n{levels}"
        )


def noted_rounding(state_dir: Path) -> BaseRounding | None:
    """What was measured in this run; None: nothing."""
    file = state_dir / FILE
    if not file.is_file():
        return None
    values = json.loads(file.read_text(encoding="utf-8"))
    for name in ("velocity", "size"):
        values[name] = tuple(values[name])
    return BaseRounding(**values)


def relative_rms(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in float64; 0 where both are zero."""
    difference = float((found.double() - expected.double()).norm())
    return difference / float(expected.double().norm()) if difference else 0.0


@torch.no_grad()
def velocities(
    transformer: Any,
    latents: Tensor,
    texts: tuple[Tensor, Tensor],
    *,
    seed: int,
    guidance_scale: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Velocity of one image's latents (1, C, h, w) at each of `NOISE_LEVELS`, on the CPU."""
    # Drawn on the CPU, so that every device sees the same.
    noise = torch.randn(latents.shape, generator=keyed_generator(seed, _STREAM, "velocity"))
    found = []
    for level in NOISE_LEVELS:
        noised = (1 - level) * latents.float().cpu() + level * noise
        velocity = backbone_of(transformer).predict(
            transformer,
            noised.to(latents.device),
            torch.tensor([level], device=latents.device),
            *texts,
            guidance_scale=guidance_scale,
            dtype=dtype,
        )
        found.append(velocity.cpu())
    return found


@torch.no_grad()
def euler_latents(
    transformer: Any,
    like: Tensor,
    texts: tuple[Tensor, Tensor],
    *,
    seed: int,
    guidance_scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Latents of `like`'s shape from seeded noise in equal steps from t = 1 to 0, on the CPU."""
    z = torch.randn(like.shape, generator=keyed_generator(seed, _STREAM, "picture"))
    z = z.to(like.device)
    for step in range(_STEPS):
        t = torch.tensor([1 - step / _STEPS], device=like.device)
        velocity = backbone_of(transformer).predict(
            transformer, z, t, *texts, guidance_scale=guidance_scale, dtype=dtype
        )
        z = z - velocity / _STEPS
    return z.cpu()


@contextmanager
def measured_rounding(
    job: DitJob,
    model: Any,
    image: tuple[Tensor, tuple[Tensor, Tensor]],
    base: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[None]:
    """Measure around the block, in which `model` is rounded; once for a base.

    Args:
        job: whose state folder gets the numbers.
        model: on the CPU; cast to `dtype` (it is frozen).
        image: normalised latents (1, C, h, w) and text tensors (1, L, D), (1, P) of a held-out one.
        base: identity of the weights.
        dtype: in which both networks compute.
        device: likewise where.
    """
    kind, name = job.transformer.quantisation, str(dtype).removeprefix("torch.")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    noted = noted_rounding(job.state_dir)
    if noted is not None and (noted.kind, noted.dtype, noted.base) == (kind, name, base):
        yield
        return
    latents, texts = image[0][..., :_EDGE, :_EDGE].to(device), image[1]
    inputs: Any = (latents, (texts[0].to(device), texts[1].to(device)))
    options: Any = {
        "seed": job.seed,
        "guidance_scale": job.settings.guidance_scale,
        "dtype": dtype,
    }
    was_training = model.training
    model.eval()
    with _on(model, device):
        expected = velocities(model, *inputs, **options)
        picture = euler_latents(model, *inputs, **options)
    yield
    _place(model, device)
    found = velocities(model, *inputs, **options)
    other = euler_latents(model, *inputs, **options)
    model.train(was_training)
    rounding = BaseRounding(
        kind=kind,
        dtype=name,
        base=base,
        velocity=tuple(map(relative_rms, found, expected)),
        psnr_db=_picture_psnr(job, picture, other),
        size=(int(latents.shape[-2]), int(latents.shape[-1])),
    )
    job.state_dir.mkdir(parents=True, exist_ok=True)
    write_text(job.state_dir / FILE, json.dumps(asdict(rounding), indent=2) + "\n")


@contextmanager
def _on(model: Any, device: torch.device) -> Iterator[None]:
    """Run an unrounded network on a device that may be too small for it, and take it back."""
    from components.models.loading.block_offload import end_offload, offload_blocks

    if device.type == "cpu":
        yield
        return
    offload_blocks(model, device)
    try:
        yield
    finally:
        end_offload(model)


def _place(model: Any, device: torch.device) -> None:
    """Everything that is not rounded to the device where the rounded layers are."""
    from components.models.loading.quantisation import is_quantised

    for parameter in model.parameters():
        if not is_quantised(parameter):
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def _picture_psnr(job: DitJob, expected: Tensor, found: Tensor) -> float | None:
    if job.autoencoder is None:
        return None
    # With scipy, which a run on unrounded weights has no need of.
    from components.images.pixel_range import to_pixels
    from components.metrics.native.fidelity import psnr_db
    from components.models.loading.base_autoencoder import load_base_autoencoder

    autoencoder = load_base_autoencoder(job.autoencoder, job.seed)
    config = autoencoder.config
    pictures: list[ImageArray] = []
    for latents in (expected, found):
        raw = latents.float() / config.scaling_factor + config.shift_factor
        with torch.no_grad():
            pictures += to_pixels(autoencoder.decode(raw, return_dict=False)[0])
    return psnr_db(*pictures)
