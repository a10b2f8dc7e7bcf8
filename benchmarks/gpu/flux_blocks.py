"""The two kinds of Flux block in plain torch, so that a GPU machine needs nothing but torch.

Their arithmetic is that of diffusers' `FluxTransformerBlock` and
`FluxSingleTransformerBlock` (a test compares outputs on shared weights). Shapes: B batch, T tokens
of text and image together (text first), D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (q, k, v), each (B, H, T, head), to (B, H, T, head)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (B, T, H, head) by tables (T, head), in float32."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (x.float() * cos[:, None] + turned.float() * sin[:, None]).to(x.dtype)


class Modulation(nn.Module):
    """SiLU and a linear layer to `parts` vectors of width D for each sample."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)

    def forward(self, temb: Tensor) -> tuple[Tensor, ...]:
        """(B, D) to `parts` of (B, 1, D)."""
        return self.linear(F.silu(temb))[:, None].chunk(self.parts, dim=-1)


class Projections(nn.Module):
    """q, k, v of one stream with RMS norm of q and k; one product after `fuse`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))
        self.joint: nn.Linear | None = None

    def fuse(self) -> None:
        """Join the three products."""
        parts = (self.to_q, self.to_k, self.to_v)
        joint = nn.Linear(self.to_q.in_features, 3 * self.to_q.out_features, device="meta")
        joint.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]))
        joint.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]))
        self.joint = joint
        del self.to_q, self.to_k, self.to_v

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) to q, k, v, each (B, T, H, head)."""
        if self.joint is None:
            q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        else:
            q, k, v = self.joint(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        return self.norm_q(q), self.norm_k(k), v


def mlp(width: int) -> nn.Sequential:
    """Linear to 4 D, tanh GELU, linear back."""
    return nn.Sequential(
        nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
    )


def _attended(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor]
) -> Tensor:
    q, k = rotate(q, *rope), rotate(k, *rope)
    mixed = attend(*(part.transpose(1, 2) for part in (q, k, v)))
    return mixed.transpose(1, 2).flatten(2)


class DoubleBlock(nn.Module):
    """Text and image streams with weights of their own and one attention over both."""

    def __init__(self, width: int, heads: int, attend: Attend, text_tokens: int) -> None:
        super().__init__()
        self.attend, self.text_tokens, self.width = attend, text_tokens, width
        self.modulation = nn.ModuleList(Modulation(width, 6) for _ in range(2))
        self.qkv = nn.ModuleList(Projections(width, heads) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.mlp = nn.ModuleList(mlp(width) for _ in range(2))

    def forward(self, x: Tensor, temb: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        cut, norm = self.text_tokens, (self.width,)
        streams = [x[:, :cut], x[:, cut:]]
        parts = [modulation(temb) for modulation in self.modulation]
        qkv = [
            project(F.layer_norm(s, norm, eps=1e-6) * (1 + part[1]) + part[0])
            for project, s, part in zip(self.qkv, streams, parts, strict=True)
        ]
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(*qkv, strict=True))
        mixed = _attended(self.attend, q, k, v, rope)
        results = []
        for number, attended in enumerate((mixed[:, :cut], mixed[:, cut:])):
            _, _, gate, shift, scale, gate_mlp = parts[number]
            s = streams[number] + gate * self.out[number](attended)
            hidden = F.layer_norm(s, norm, eps=1e-6) * (1 + scale) + shift
            results.append(s + gate_mlp * self.mlp[number](hidden))
        return torch.cat(results, dim=1)


class SingleBlock(nn.Module):
    """One stream; attention and MLP side by side."""

    def __init__(self, width: int, heads: int, attend: Attend) -> None:
        super().__init__()
        self.attend, self.width = attend, width
        self.modulation = Modulation(width, 3)
        self.qkv = Projections(width, heads)
        self.proj_mlp = nn.Linear(width, 4 * width)
        self.proj_out = nn.Linear(5 * width, width)

    def forward(self, x: Tensor, temb: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        shift, scale, gate = self.modulation(temb)
        normed = F.layer_norm(x, (self.width,), eps=1e-6) * (1 + scale) + shift
        mixed = _attended(self.attend, *self.qkv(normed), rope)
        hidden = F.gelu(self.proj_mlp(normed), approximate="tanh")
        return x + gate * self.proj_out(torch.cat((mixed, hidden), dim=-1))


class Blocks(nn.Module):
    """A stack of double blocks, then single ones."""

    def __init__(
        self, doubles: int, singles: int, width: int, heads: int, attend: Attend, text_tokens: int
    ) -> None:
        super().__init__()
        double = (DoubleBlock(width, heads, attend, text_tokens) for _ in range(doubles))
        single = (SingleBlock(width, heads, attend) for _ in range(singles))
        self.blocks = nn.ModuleList([*double, *single])

    def forward(
        self, x: Tensor, temb: Tensor, rope: tuple[Tensor, Tensor], repeat: Callable[..., Tensor]
    ) -> Tensor:
        """`repeat(block, x, temb, rope)` runs a block, with or without checkpointing."""
        for block in self.blocks:
            x = repeat(block, x, temb, rope)
        return x
