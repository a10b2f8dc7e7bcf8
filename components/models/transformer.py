"""Flux transformer with Resonance 2D RoPE as part of its configuration.

The stock class builds its position embedding from constants; assigning another one to `pos_embed`
works until the model is saved and loaded. Here variant, window and base are configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.hooks.context_parallel import EquipartitionSharder
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from components.files.weight_folders import require_class
from components.models.resonance_rope import ResonanceRope2D, RopeVariant, grid_ids

# ModelMixin is here for diffusers: to load a component of a saved pipeline, it looks its base class
# up by this name in the component's own module.
__all__ = ["ModelMixin", "UltraFluxTransformer2DModel", "grid_of_ids"]

# Largest integer up to which a dtype holds every integer exactly.
EXACT_INTEGERS = {torch.bfloat16: 256, torch.float16: 2048}


@torch.compiler.disable
def grid_of_ids(img_ids: Tensor) -> tuple[int, int]:
    """(tokens_h, tokens_w) of a full set of image position ids (N, 3).

    Copies two numbers to the host, so it is kept out of compiled graphs; pass `grid_hw` to avoid
    it. Ids of a part of the image (context parallelism) would give the wrong extent.
    """
    # Ids count from 0 on each axis, so the highest is the extent less one.
    highest = img_ids.amax(dim=0)[1:].tolist()
    return int(highest[0]) + 1, int(highest[1]) + 1


class UltraFluxTransformer2DModel(FluxTransformer2DModel):
    """FluxTransformer2DModel whose rotary tables depend on the image's extent in tokens.

    Args (beyond FluxTransformer2DModel's):
        rope_variant: see `components.models.resonance_rope`.
        rope_window: training window in tokens per axis.
        rope_theta: rotary base.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        rope_variant: RopeVariant = "official",
        rope_window: int = 64,
        rope_theta: float = 10000.0,
    ) -> None:
        if sum(axes_dims_rope) != attention_head_dim:
            raise ValueError(
                f"axes_dims_rope: {tuple(axes_dims_rope)} must add up to attention_head_dim "
                f"{attention_head_dim}"
            )
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope,
        )
        # Built here and not assigned to a finished model: what is not in the constructor is not in
        # config.json, and a reloaded model would silently have plain positions again.
        self.pos_embed = ResonanceRope2D(axes_dims_rope, rope_theta, rope_window, rope_variant)
        # Not configuration: it is the state of a call and must not be saved.
        self._context_grid: tuple[int, int] | None = None

    @contextmanager
    def grid_context(self, tokens_h: int, tokens_w: int) -> Iterator[None]:
        """Fix the grid for the forward calls inside.

        For callers that cannot pass `grid_hw` themselves, such as stock pipelines.
        """
        # Restored, not cleared, so that contexts may nest.
        previous = self._context_grid
        self._context_grid = (tokens_h, tokens_w)
        try:
            yield
        finally:
            self._context_grid = previous

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: list[Tensor] | None = None,
        controlnet_single_block_samples: list[Tensor] | None = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
        grid_hw: tuple[int, int] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity of packed latents.

        Under diffusers' context parallelism pass whole tensors and `grid_hw` on every rank; ids
        may be None but must be named in the call (diffusers looks them up to split them).

        Args:
            hidden_states: (B, tokens_h * tokens_w, in_channels) packed 2x2 latents, row by row.
            encoder_hidden_states: (B, L, joint_attention_dim) T5 embeddings.
            pooled_projections: (B, pooled_projection_dim) CLIP embedding.
            timestep: (B,) noise level t in [0, 1].
            img_ids: (N, 3) position ids of the image tokens, float32; made from the grid if None.
            txt_ids: (L, 3) zeros; made if None.
            guidance: (B,) guidance scale for models with guidance embedding.
            joint_attention_kwargs: as in diffusers.
            controlnet_block_samples: as in diffusers.
            controlnet_single_block_samples: as in diffusers.
            return_dict: output object instead of a tuple.
            controlnet_blocks_repeat: as in diffusers.
            grid_hw: (tokens_h, tokens_w). Without it, the grid of `grid_context`, else the extent
                of `img_ids` (one host copy a call).

        Returns:
            `sample` (B, N, out_channels).

        Raises:
            ValueError: neither grid nor ids, they do not match the tokens, or ids of a dtype that
                cannot hold the grid's positions exactly.
        """
        # The argument wins: whoever passes it knows this batch, a context is only the surroundings.
        grid = grid_hw or self._context_grid
        if img_ids is None:
            if grid is None:
                raise ValueError("grid_hw: pass it, or img_ids")
            img_ids = self._share_of_rank(grid_ids(*grid, device=hidden_states.device))
        elif img_ids.ndim == 3:
            # diffusers splits ids of two axes only.
            img_ids = self._share_of_rank(img_ids[0])
        if grid is None:
            if self._context_parallel() is not None:
                raise ValueError(
                    "grid_hw: pass it, because a rank sees the ids of a part of the image only"
                )
            grid = grid_of_ids(img_ids)
        # Named here: the attention would only speak of two sizes that differ.
        _check_ids(img_ids, hidden_states.shape[1], grid)
        if txt_ids is None:
            # As many as this rank holds: under context parallelism the text is split before
            # `forward` too.
            txt_ids = img_ids.new_zeros(encoder_hidden_states.shape[1], 3)
        elif txt_ids.ndim == 3:
            txt_ids = txt_ids[0]
        # diffusers' forward calls pos_embed with ids alone; the extent reaches it this way.
        self.pos_embed.grid_hw = grid
        return super().forward(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            img_ids=img_ids,
            # They are joined to the image's ids, whose dtype must hold the grid exactly.
            txt_ids=txt_ids.to(img_ids.dtype),
            guidance=guidance,
            joint_attention_kwargs=joint_attention_kwargs,
            controlnet_block_samples=controlnet_block_samples,
            controlnet_single_block_samples=controlnet_single_block_samples,
            return_dict=return_dict,
            controlnet_blocks_repeat=controlnet_blocks_repeat,
        )

    def _context_parallel(self) -> Any | None:
        """Diffusers' ContextParallelConfig when `enable_parallelism` was called with one."""
        return getattr(self._parallel_config, "context_parallel_config", None)

    def _share_of_rank(self, ids: Tensor) -> Tensor:
        """Rows of whole-image ids for the tokens that this rank was given.

        diffusers' split runs before `forward` and passes over arguments that are None.
        """
        config = self._context_parallel()
        if config is None:
            return ids
        if config.ulysses_anything or config.ring_anything:
            # Uneven shares: the first ranks get one row more, as diffusers' own split of the
            # tokens.
            parts = ids.tensor_split(config._flattened_mesh.size(), dim=0)
            return parts[dist.get_rank(config._flattened_mesh.get_group())]
        return EquipartitionSharder.shard(ids, 0, config._flattened_mesh)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> UltraFluxTransformer2DModel:
        """Load our folder or a stock Flux folder; keyword arguments are diffusers' own.

        A stock folder gets the default rope settings unless they are passed.

        Raises:
            WeightsMissing: no config.json there.
            ValueError: the folder holds another class.
        """
        require_class(
            pretrained_model_name_or_path,
            kwargs.get("subfolder"),
            ("UltraFluxTransformer2DModel", "FluxTransformer2DModel"),
        )
        model: UltraFluxTransformer2DModel = super().from_pretrained(
            pretrained_model_name_or_path, **kwargs
        )
        # diffusers records the folder in the configuration; saved bytes must not depend on it.
        model.register_to_config(_name_or_path="")
        return model


def _check_ids(img_ids: Tensor, tokens: int, grid: tuple[int, int]) -> None:
    if img_ids.shape[0] != tokens:
        raise ValueError(f"img_ids: {img_ids.shape[0]} positions for {tokens} image tokens")
    # Rounded ids give neighbouring rows or columns one position, and nothing fails.
    limit = EXACT_INTEGERS.get(img_ids.dtype)
    if limit is not None and max(grid) > limit + 1:
        raise ValueError(
            f"img_ids: {img_ids.dtype} is exact only to {limit}, the grid is "
            f"{grid[0]}x{grid[1]}; keep position ids in float32"
        )
