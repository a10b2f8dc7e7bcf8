"""Names of Flux' layers in the original code, which ComfyUI and the kohya scripts use.

There query, key and value (and a single block's MLP) are one layer: their changes stand in one
matrix, each in its own rows. That matrix is the sum over the parts, exact at the sum of the ranks.
Names are `lora_unet_` and the original path with underscores, factors `lora_down` and `lora_up`.
"""

from __future__ import annotations

import re

import torch

from components.training.adapters.low_rank import Change, LowRank

PREFIX = "lora_unet_"
_MLP_RATIO = 4
"""Width of a single block's MLP by the block's own: part of the architecture."""
_WHOLE = {
    "attn.to_out.0": "img_attn_proj",
    "attn.to_add_out": "txt_attn_proj",
    "ff.net.0.proj": "img_mlp_0",
    "ff.net.2": "img_mlp_2",
    "ff_context.net.0.proj": "txt_mlp_0",
    "ff_context.net.2": "txt_mlp_2",
    "norm1.linear": "img_mod_lin",
    "norm1_context.linear": "txt_mod_lin",
}
_WHOLE_SINGLE = {"proj_out": "linear2", "norm.linear": "modulation_lin"}
_PARTS = {
    **{f"attn.to_{part}": ("img_attn_qkv", at) for at, part in enumerate("qkv")},
    **{f"attn.add_{part}_proj": ("txt_attn_qkv", at) for at, part in enumerate("qkv")},
}
_PARTS_SINGLE = {
    **{f"attn.to_{part}": ("linear1", at) for at, part in enumerate("qkv")},
    "proj_mlp": ("linear1", 3),
}
_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer_linear",
    "time_text_embed.timestep_embedder.linear_1": "time_in_in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in_out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in_in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in_out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in_in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in_out_layer",
}
_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")


def original_names(change: Change) -> dict[str, LowRank]:
    """The same change with the original layers and names.

    Raises:
        ValueError: a layer that the original code has no counterpart of; names it.
    """
    whole: dict[str, LowRank] = {}
    parts: dict[str, dict[int, LowRank]] = {}
    for name, one in change.items():
        found = _BLOCK.fullmatch(name)
        if name in _OUTSIDE:
            whole[PREFIX + _OUTSIDE[name]] = one
        elif name == "norm_out.linear":
            # Rows of scale and shift are the other way round there.
            scale, shift = one.up.chunk(2, 0)
            up = torch.cat([shift, scale], 0)
            whole[f"{PREFIX}final_layer_adaLN_modulation_1"] = LowRank(one.down, up)
        elif found is None:
            raise ValueError(f"adapter: layer {name} has no name in ComfyUI's layout of Flux")
        else:
            is_single, number, layer = bool(found[1]), found[2], found[3]
            block = f"{PREFIX}{'single' if is_single else 'double'}_blocks_{number}_"
            if layer in (names := _WHOLE_SINGLE if is_single else _WHOLE):
                whole[block + names[layer]] = one
            elif layer in (split := _PARTS_SINGLE if is_single else _PARTS):
                target, place = split[layer]
                parts.setdefault(block + target, {})[place] = one
            else:
                raise ValueError(f"adapter: layer {name} has no name in ComfyUI's layout of Flux")
    for name, members in parts.items():
        whole[name] = _stacked(members, has_mlp=name.endswith("linear1"))
    return whole


def _stacked(members: dict[int, LowRank], *, has_mlp: bool) -> LowRank:
    """One change of a fused layer; parts that are not changed have rows of zeros."""
    width = int(next(iter(members.values())).down.shape[1])
    heights = [width, width, width, _MLP_RATIO * width] if has_mlp else [width, width, width]
    ranks = [members[place].rank if place in members else 0 for place in range(len(heights))]
    first = next(iter(members.values()))
    up = first.up.new_zeros(sum(heights), sum(ranks))
    for place, one in members.items():
        row, column = sum(heights[:place]), sum(ranks[:place])
        up[row : row + heights[place], column : column + ranks[place]] = one.up
    down = torch.cat([members[place].down for place in sorted(members)], 0)
    return LowRank(down, up)
