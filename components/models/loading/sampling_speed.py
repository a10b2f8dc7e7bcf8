"""Ways to sample faster by diffusers' own means; which of them change the picture is said at each.

- `attention_backend` (diffusers' dispatcher): `native` is torch's and the reference; `flash`
  (flash-attn), `flash_3` and `cudnn` compute the same product and differ by rounding; `sage`
  (sageattention) rounds queries and keys to 8 bits.
- `step_cache` (diffusers' cache hooks): `first_block` leaves the other blocks of a step out while
  the first one's contribution changes by less than a threshold, and repeats theirs (ParaAttention's
  first block cache); `taylorseer` computes every n-th step and extrapolates the prediction of those
  between (2503.06923, its form that keeps the last projection alone). Approximate, both.
- `compile`: every block as compiled code. Differs by rounding.

All are off unless asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from typing import Any, Literal

from components.files.install_hints import package_hint
from components.models.loading.block_compile import compile_blocks, require_compiler
from components.models.loading.transformer_blocks import transformer_blocks
from components.settings.evaluation import AttentionBackend, GenerateSettings, StepCache

_SECTION = "generate"
# Their names in diffusers' dispatcher.
_DISPATCHED: dict[AttentionBackend, str] = {
    "native": "native",
    "flash": "flash",
    "flash_3": "_flash_3",
    "cudnn": "_native_cudnn",
    "sage": "sage",
}
_PACKAGES: dict[AttentionBackend, tuple[str, str]] = {
    "flash": ("flash_attn", f"the package flash-attn ({package_hint('flash-attn')})"),
    "flash_3": ("flash_attn_interface", "FlashAttention 3 (flash_attn_interface, from its source)"),
    "sage": ("sageattention", f"the package sageattention ({package_hint('sageattention')})"),
}
_ALL_OFF = {"attention_backend": "native", "step_cache": "none", "compile": "none"}
_READ_BY = {"step_cache_threshold": "first_block", "step_cache_interval": "taylorseer"}


@dataclass(frozen=True)
class SamplingSpeed:
    """What is switched on."""

    attention_backend: AttentionBackend = "native"
    step_cache: StepCache = "none"
    step_cache_threshold: float = 0.05
    """Of `first_block`: largest relative change of the first block's contribution (mean absolute)
    at which the other blocks are left out."""
    step_cache_interval: int = 5
    """Of `taylorseer`: steps from one computed step to the next."""
    compile: Literal["none", "blocks"] = "none"

    def deciding(self) -> dict[str, Any]:
        """Values by name, without what is off: pictures of before keep their identity."""
        return {
            name: value
            for name, value in asdict(self).items()
            if value != _ALL_OFF.get(name)
            and _READ_BY.get(name, self.step_cache) == self.step_cache
        }

    def check(self, device: str, dtype: str) -> None:
        """Refuse what cannot run, before anything is loaded.

        Args:
            device: where the transformer computes, such as "cpu" or "cuda:0".
            dtype: in which, such as "bfloat16".

        Raises:
            ValueError: one line with everything that is missing.
        """
        lacks = [*self._lacking(device, dtype)]
        if lacks:
            raise ValueError(
                f"{_SECTION}.attention_backend {self.attention_backend} needs {' and '.join(lacks)}"
            )
        if self.compile == "blocks" and self.step_cache != "none":
            raise ValueError(
                f"{_SECTION}.compile blocks and step_cache {self.step_cache}: choose one (the "
                "caches' hooks decide block by block and are no part of compiled code)"
            )
        if self.compile == "blocks" and device == "cpu":
            require_compiler(f"{_SECTION}.compile blocks")

    def _lacking(self, device: str, dtype: str) -> Iterator[str]:
        backend = self.attention_backend
        if backend == "native":
            return
        if not device.startswith("cuda"):
            yield f"a CUDA GPU (the device is {device})"
        if dtype == "float32":
            yield "dtype bfloat16 or float16 (it is float32)"
        module, package = _PACKAGES.get(backend, ("torch", ""))
        if find_spec(module) is None:
            yield package


def sampling_speed(settings: GenerateSettings) -> SamplingSpeed:
    """What the section `generate` asks for."""
    return SamplingSpeed(**{one.name: getattr(settings, one.name) for one in fields(SamplingSpeed)})


def speed_up(transformer: Any, speed: SamplingSpeed) -> None:
    """Switch on what the settings ask for; call before blocks are offloaded.

    Args:
        transformer: of diffusers.
        speed: checked.

    Raises:
        ValueError: this backbone has no such way, or a package is too old.
    """
    name = type(transformer).__name__
    if speed.attention_backend != "native":
        _dispatch(transformer, speed.attention_backend)
    if speed.step_cache != "none":
        if not hasattr(transformer, "enable_cache"):
            raise ValueError(
                f"{_SECTION}.step_cache {speed.step_cache}: diffusers has no caches for {name}; "
                "use none"
            )
        transformer.enable_cache(_cache_config(speed))
    if speed.compile == "blocks":
        compile_blocks(transformer)


def _dispatch(transformer: Any, backend: AttentionBackend) -> None:
    from diffusers.models.attention_dispatch import attention_backend

    processors = getattr(transformer, "attn_processors", {}).values()
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise ValueError(
            f"{_SECTION}.attention_backend {backend}: the attention of "
            f"{type(transformer).__name__} does not go through diffusers' dispatcher; use native"
        )
    # diffusers also makes it the back end of every network that has none of its own; the context
    # takes that back.
    with attention_backend("native"):
        try:
            transformer.set_attention_backend(_DISPATCHED[backend])
        except (RuntimeError, ValueError) as problem:
            reason = " ".join(str(problem).split())
            raise ValueError(f"{_SECTION}.attention_backend {backend}: {reason}") from None


def _cache_config(speed: SamplingSpeed) -> Any:
    import torch
    from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

    if speed.step_cache == "first_block":
        return FirstBlockCacheConfig(threshold=speed.step_cache_threshold)
    return TaylorSeerCacheConfig(
        cache_interval=speed.step_cache_interval,
        # In the whole form every block keeps its last outputs: 100 MB a tensor at 4096 px.
        use_lite_mode=True,
        taylor_factors_dtype=torch.float32,
    )


def forget_steps(transformer: Any) -> None:
    """Let nothing of a picture before, also of one that was not finished, reach the next one."""
    if getattr(transformer, "is_cache_enabled", False):
        transformer._reset_stateful_cache()


@dataclass
class BlockCount:
    """Blocks of all passes so far."""

    computed: int = 0
    total: int = 0


@contextmanager
def counted_blocks(transformer: Any) -> Iterator[BlockCount]:
    """Count the blocks that are computed inside, of those that whole passes would compute."""
    count = BlockCount()
    blocks = list(transformer_blocks(transformer))

    # No hook in compiled code, which leaves no block out.
    compiled = any(block._compiled_call_impl is not None for block in blocks)

    def passed(*_: Any) -> None:
        count.total += len(blocks)
        count.computed += len(blocks) if compiled else 0

    def computed(*_: Any) -> None:
        count.computed += 1

    handles = [transformer.register_forward_pre_hook(passed)]
    # A cache stands in front of the block's own forward; what is inside is reached only if it runs.
    if not compiled:
        handles += [block.attn.register_forward_pre_hook(computed) for block in blocks]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()
