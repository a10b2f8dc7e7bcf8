"""Rows of one card, on the real transformer class: adapter training and ways to sample.

Training: a LoRA of rank 64 on a frozen base in bf16, int8, nf4 or fp8, blocks checkpointed, and
with activations or the base's blocks on the host. Sampling: attention back ends of diffusers'
dispatcher, rounded weights, block-offload, compiled blocks, step caches. Approximate rows carry
their relative error (RMS of the prediction, or of the final latents). Needs diffusers and peft;
what is missing is named in the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from block_variants import NotMeasured
from torch import Tensor

RANK, REPEATS = 64, 3
_SHARES = (2, 7, 7)
"""Of a head's channels per axis, as Flux has them."""
TEXT_WIDTH, POOLED_WIDTH = 4096, 768
# What is a row of training: kind of base, and what waits on the host.
TRAINING = (
    ("none", ()),
    ("int8", ()),
    ("nf4", ()),
    ("fp8", ()),
    ("int8", ("activations",)),
    ("nf4", ("activations",)),
    ("none", ("activations", "base")),
    ("int8", ("activations", "base")),
)
BACK_ENDS = ("native", "flash", "flash_3", "cudnn", "sage")
KINDS = ("int8", "nf4", "fp8")
CACHES = (
    {},
    {"step_cache": "first_block", "step_cache_threshold": 0.1},
    {"step_cache": "taylorseer"},
)


@contextmanager
def _said() -> Iterator[None]:
    """What this machine lacks is a note in the row, not a failure."""
    try:
        yield
    except ImportError as missing:
        raise NotMeasured(f"no {missing.name}") from None
    except ValueError as refused:
        raise NotMeasured(" ".join(str(refused).split())) from None


def network(bench: Any) -> Any:
    """Flux with random weights on the device, bf16."""
    from components.models.transformer import UltraFluxTransformer2DModel

    scale, before = bench.scale, torch.get_default_dtype()
    head = scale.width // scale.heads
    torch.set_default_dtype(bench.dtype)
    try:
        with torch.device(bench.device):
            torch.manual_seed(0)
            model = UltraFluxTransformer2DModel(
                num_layers=scale.doubles,
                num_single_layers=scale.singles,
                attention_head_dim=head,
                num_attention_heads=scale.heads,
                joint_attention_dim=TEXT_WIDTH,
                pooled_projection_dim=POOLED_WIDTH,
                guidance_embeds=True,
                axes_dims_rope=tuple(share * head // sum(_SHARES) for share in _SHARES),
            )
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def inputs(bench: Any) -> dict[str, Tensor]:
    """Latents and texts of one sample."""
    scale, generator = bench.scale, torch.Generator(bench.device).manual_seed(1)
    options: dict[str, Any] = {"generator": generator, "device": bench.device}
    return {
        "latents": torch.randn(1, 16, 2 * scale.grid, 2 * scale.grid, **options),
        "text": torch.randn(1, scale.text, TEXT_WIDTH, **options),
        "pooled": torch.randn(1, POOLED_WIDTH, **options),
    }


def predict(bench: Any, model: Any, given: dict[str, Tensor], t: float) -> Tensor:
    """Velocity at noise level t, float32."""
    from components.models.backbones import backbone_of

    level = torch.tensor([t], device=bench.device)
    texts = (given["text"], given["pooled"])
    velocity: Tensor = backbone_of(model).predict(
        model, given["latents"], level, *texts, guidance_scale=4.0, dtype=bench.dtype
    )
    return velocity


def _adapter_step(
    bench: Any, kind: Any, waiting: tuple[str, ...]
) -> tuple[Callable[[], None], str]:
    with _said():
        from peft import LoraConfig

        from components.models.loading.block_offload import offload_frozen_blocks
        from components.models.loading.quantisation import quantise
        from components.training.sharded.activation_checkpointing import (
            enable_activation_checkpointing,
        )

        model = network(bench)
        quantise(model, kind, dtype=bench.dtype, device=bench.device)
        layers = ("to_q", "to_k", "to_v", "to_out.0")
        layers += ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        # As `training.dit.adapters.add_adapter`, which imports what only a whole training needs.
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(layers)))
        if "base" in waiting:
            offload_frozen_blocks(model, bench.device, bench.dtype)
        enable_activation_checkpointing(model, "blocks", to_host="activations" in waiting)
    model.train()
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=False)
    given = inputs(bench)

    def call() -> None:
        predict(bench, model, given, 0.5).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return call, f"rank {RANK}, batch 1, blocks checkpointed"


def measure_adapters(bench: Any, flops: int) -> None:
    """A training step of an adapter for each base and what waits on the host.

    Args:
        bench: device, sizes and rows.
        flops: of a forward pass; an adapter's backward pass has no gradients of frozen weights.
    """
    for kind, waiting in TRAINING:
        held = "bf16" if kind == "none" else kind
        on_host = f", {' and '.join(waiting)} on the host" if waiting else ""
        bench.row(
            "adapter",
            f"LoRA step, {held} base{on_host}",
            lambda k=kind, w=waiting: _adapter_step(bench, k, w),
            2 * flops,
            repeats=min(REPEATS, bench.scale.repeats),
        )


def relative_error(found: Tensor, exact: Tensor) -> float:
    """RMS of the difference over that of the exact one."""
    return float((found.float() - exact.float()).norm() / exact.float().norm())


def _sampling_step(
    bench: Any, exact: list[Tensor], *, kind: Any = "none", offload: bool = False, **speed: Any
) -> tuple[Callable[[], Tensor], str]:
    with _said():
        from components.models.loading.block_offload import offload_blocks
        from components.models.loading.quantisation import quantise
        from components.models.loading.sampling_speed import SamplingSpeed, speed_up

        chosen = SamplingSpeed(**speed)
        chosen.check(bench.device.type, "bfloat16")
        model = network(bench)
        quantise(model, kind, dtype=bench.dtype, device=bench.device)
        speed_up(model, chosen)
        if offload:
            offload_blocks(model.to("cpu"), bench.device)
            for name, part in model.named_children():
                if not name.endswith("transformer_blocks"):
                    part.to(bench.device)
    given = inputs(bench)

    def call() -> Tensor:
        with torch.no_grad():
            return predict(bench, model, given, 0.5)

    found = call().cpu()
    if not exact:
        exact.append(found)
    return call, f"error {relative_error(found, exact[0]):.1e}"


def _picture(bench: Any, exact: list[Tensor], speed: dict[str, Any]) -> tuple[Callable, str]:
    with _said():
        from components.models.loading.sampling_speed import (
            SamplingSpeed,
            counted_blocks,
            forget_steps,
            speed_up,
        )

        model = network(bench)
        speed_up(model, SamplingSpeed(**speed))
    given, steps = inputs(bench), bench.scale.cached_steps

    def call() -> Tensor:
        forget_steps(model)
        z = given["latents"].clone()
        with torch.no_grad(), model.cache_context("cond"):
            for step in range(steps):
                t = 1 - step / steps
                z = z - predict(bench, model, {**given, "latents": z}, t) / steps
        return z

    with counted_blocks(model) as count:
        found = call().cpu()
    if not exact:
        exact.append(found)
    error = f"error {relative_error(found, exact[0]):.1e}"
    return call, f"{count.computed} of {count.total} blocks; {error}"


def measure_ways(bench: Any, flops: int) -> None:
    """A sampling step in each way, then all steps of an image with each step cache.

    Args:
        bench: device, sizes and rows.
        flops: of a forward pass.
    """
    exact: list[Tensor] = []

    def step(what: str, **way: Any) -> None:
        bench.row(
            "ways",
            what,
            lambda: _sampling_step(bench, exact, **way),
            flops,
            repeats=min(REPEATS, bench.scale.repeats),
        )

    for name in BACK_ENDS:
        step(f"sampling step, attention {name}", attention_backend=name)
    for kind in KINDS:
        step(f"sampling step, {kind} weights", kind=kind)
    step("sampling step, compiled blocks", compile="blocks")
    step("sampling step, block-offload", offload=True)
    step("sampling step, int8, block-offload", kind="int8", offload=True)
    pictures: list[Tensor] = []
    for speed in CACHES:
        name = " ".join(str(value) for value in speed.values()) or "exact"
        what = f"{bench.scale.cached_steps} steps, {name}"
        bench.row("ways", what, lambda s=speed: _picture(bench, pictures, s), repeats=1)
