"""Names of Flux' layers in the original code, which ComfyUI and the kohya scripts use.

There query, key and value (and a single block's MLP) are one layer: their changes stand in one
matrix, each in its own rows. That matrix is the sum over the parts, exact at the sum of the ranks.
Names are `lora_unet_` and the original path with underscores, factors `lora_down` and `lora_up`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

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
_LAST_MODULATION = "final_layer_adaLN_modulation_1"
_MLP_PLACE = 3
"""Of a single block's MLP behind query, key and value."""
_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")


def _place(name: str) -> tuple[str, int | None]:
    """(original layer, place among the parts that share it; None: it is the layer's alone).

    Raises:
        ValueError: a layer that the original code has no counterpart of; names it.
    """
    if name in _OUTSIDE:
        return PREFIX + _OUTSIDE[name], None
    if name == "norm_out.linear":
        return f"{PREFIX}{_LAST_MODULATION}", None
    found = _BLOCK.fullmatch(name)
    if found is not None:
        is_single, number, layer = bool(found[1]), found[2], found[3]
        block = f"{PREFIX}{'single' if is_single else 'double'}_blocks_{number}_"
        if layer in (names := _WHOLE_SINGLE if is_single else _WHOLE):
            return block + names[layer], None
        if layer in (split := _PARTS_SINGLE if is_single else _PARTS):
            target, at = split[layer]
            return block + target, at
    raise ValueError(f"adapter: layer {name} has no name in ComfyUI's layout of Flux")


def original_names(change: Change) -> dict[str, LowRank]:
    """The same change with the original layers and names.

    Raises:
        ValueError: a layer that the original code has no counterpart of; names it.
    """
    whole: dict[str, LowRank] = {}
    parts: dict[str, dict[int, LowRank]] = {}
    for name, one in change.items():
        target, place = _place(name)
        if place is not None:
            parts.setdefault(target, {})[place] = one
        else:
            whole[target] = _turned(one) if target.endswith(_LAST_MODULATION) else one
    for name, members in parts.items():
        whole[name] = _stacked(members, has_mlp=name.endswith("linear1"))
    return whole


def diffusers_names(whole: Change, ranks: Mapping[str, int]) -> dict[str, LowRank]:
    """The inverse of `original_names`, value for value.

    Args:
        whole: by original layers.
        ranks: of the change that it was, by diffusers' layers.

    Raises:
        ValueError: a layer is missing in `whole`, or has another rank.
    """
    change: dict[str, LowRank] = {}
    places = {name: _place(name) for name in ranks}
    for name, (target, place) in places.items():
        fused = whole.get(target)
        together = [other for other, where in places.items() if where[0] == target]
        if fused is None or fused.rank != sum(ranks[other] for other in together):
            raise ValueError(f"adapter: layer {target} is missing or not of the rank that it says")
        if place is None:
            change[name] = _turned(fused) if target.endswith(_LAST_MODULATION) else fused
            continue
        column = sum(ranks[other] for other in together if (places[other][1] or 0) < place)
        columns = slice(column, column + ranks[name])
        width = int(fused.down.shape[1])
        height = _MLP_RATIO * width if place == _MLP_PLACE else width
        rows = slice(place * width, place * width + height)
        change[name] = LowRank(fused.down[columns], fused.up[rows, columns])
    return change


def _turned(one: LowRank) -> LowRank:
    """Rows of scale and shift are the other way round there."""
    first, second = one.up.chunk(2, 0)
    return LowRank(one.down, torch.cat([second, first], 0))


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
