"""The GPU benchmark's blocks are Flux's, and its script runs through on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys

import flux_blocks
import pytest
import torch
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch.nn.functional import scaled_dot_product_attention

WIDTH, HEADS, TEXT, IMAGE = 32, 2, 3, 6


def copy(pairs):
    for ours, theirs in pairs:
        ours.load_state_dict(theirs.state_dict())


def tokens():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, TEXT + IMAGE, WIDTH, generator=generator)
    angles = torch.randn(TEXT + IMAGE, WIDTH // HEADS // 2, generator=generator)
    angles = angles.repeat_interleave(2, dim=-1)
    return x, torch.randn(2, WIDTH, generator=generator), (angles.cos(), angles.sin())


@pytest.mark.parametrize("fused", [False, True])
def test_the_double_block_computes_what_diffusers_block_computes(fused):
    theirs = FluxTransformerBlock(WIDTH, HEADS, WIDTH // HEADS)
    ours = flux_blocks.DoubleBlock(WIDTH, HEADS, scaled_dot_product_attention, TEXT)
    a, (text, image) = theirs.attn, ours.qkv
    copy(
        [
            (ours.modulation[0].linear, theirs.norm1_context.linear),
            (ours.modulation[1].linear, theirs.norm1.linear),
            (text.to_q, a.add_q_proj),
            (text.to_k, a.add_k_proj),
            (text.to_v, a.add_v_proj),
            (text.norm_q, a.norm_added_q),
            (text.norm_k, a.norm_added_k),
            (image.to_q, a.to_q),
            (image.to_k, a.to_k),
            (image.to_v, a.to_v),
            (image.norm_q, a.norm_q),
            (image.norm_k, a.norm_k),
            (ours.out[0], a.to_add_out),
            (ours.out[1], a.to_out[0]),
            (ours.mlp[0][0], theirs.ff_context.net[0].proj),
            (ours.mlp[0][2], theirs.ff_context.net[2]),
            (ours.mlp[1][0], theirs.ff.net[0].proj),
            (ours.mlp[1][2], theirs.ff.net[2]),
        ]
    )
    if fused:
        text.fuse()
        image.fuse()
    x, temb, rope = tokens()
    expected = torch.cat(theirs(x[:, TEXT:], x[:, :TEXT], temb, rope), dim=1)
    torch.testing.assert_close(ours(x, temb, rope), expected, rtol=1e-4, atol=1e-5)


def test_the_single_block_computes_what_diffusers_block_computes():
    theirs = FluxSingleTransformerBlock(WIDTH, HEADS, WIDTH // HEADS)
    ours = flux_blocks.SingleBlock(WIDTH, HEADS, scaled_dot_product_attention)
    a = theirs.attn
    copy(
        [
            (ours.modulation.linear, theirs.norm.linear),
            (ours.qkv.to_q, a.to_q),
            (ours.qkv.to_k, a.to_k),
            (ours.qkv.to_v, a.to_v),
            (ours.qkv.norm_q, a.norm_q),
            (ours.qkv.norm_k, a.norm_k),
            (ours.proj_mlp, theirs.proj_mlp),
            (ours.proj_out, theirs.proj_out),
        ]
    )
    x, temb, rope = tokens()
    expected = torch.cat(theirs(x[:, TEXT:], x[:, :TEXT], temb, rope), dim=1)
    torch.testing.assert_close(ours(x, temb, rope), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_script_runs_through_on_a_cpu(root, tmp_path):
    path = tmp_path / "rows.json"
    words = ["benchmarks/gpu/measure.py", "--tiny", "--device", "cpu", "--json", str(path)]
    subprocess.run([sys.executable, *words], cwd=root, check=True, capture_output=True)
    rows = json.loads(path.read_text())["rows"]
    failed = [row for row in rows if "failed" in row["note"] or row["note"] == "OOM"]
    assert not failed
    groups = ["blocks", "train", "sample", "adapter", "ways", "vae"]
    assert list(dict.fromkeys(row["group"] for row in rows)) == groups
    missing = {row["what"] for row in rows if row["seconds"] is None}
    assert missing <= {
        *(f"sampling step, attention {name}" for name in ("flash", "flash_3", "cudnn", "sage")),
        "forward, FA3",
        "forward + backward, FA3",
        "forward, fp8 linears (approximate)",
    }
    notes = {row["what"]: row["note"] for row in rows}
    # Of ways that change nothing, and of those that do.
    assert notes["sampling step, block-offload"] == "error 0.0e+00"
    assert 0 < float(notes["sampling step, nf4 weights"].removeprefix("error ")) < 0.2
    assert notes["6 steps, exact"].startswith("24 of 24 blocks; error 0.0")
    assert notes["6 steps, taylorseer"].startswith("16 of 24 blocks")
    assert "needs a CUDA GPU" in notes["sampling step, attention sage"]
