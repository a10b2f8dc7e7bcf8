"""DeepSpeed's memory on one of k ranks, without DeepSpeed and without the other ranks.

An engine divides flat buffers over processes that a single fake process does not have. This one
holds, on its device, what DeepSpeed holds on one rank, and for as long: weights, float32 masters
and moments (real `torch.optim` states of a flat share), gradients from the moment at which
autograd gives them, the buckets in which they travel, and the copy of the gradients at the update.
Bytes per parameter were measured on DeepSpeed itself, with one process and with two
(tests/components/planning/test_zero_engine.py):

| | kept | during backward | at the update, besides |
|---|---|---|---|
| stage 0, fp32 | 4 + 8 | + 4, a bucket of gradients | a bucket of gradients, then 4 |
| stage 1, bf16 | 2 + 4 + 12/k | + 2, a bucket of gradients | 4/k |
| stage 1, fp32 | 4 + 12/k | + 4, 4/k | 8/k |
| stage 2, bf16 | 2 + 12/k | + 4/k, two buckets | 4/k |
| stage 2, fp32 | 4 + 12/k | + 4/k, two buckets; 4/k when gradients accumulate | 4/k |
| stage 3 | as stage 2, of weights a share and what is gathered | | |
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from components.settings.training import DitStageSettings
from components.training.distributed.engine_limits import ALLREDUCE_ELEMENTS, BUCKET_ELEMENTS
from components.training.distributed.optimizers import build_optimizer


class ZeroEngine:
    """What the trainer asks of a `deepspeed.DeepSpeedEngine`, on one rank of several."""

    def __init__(
        self, model: nn.Module, settings: DitStageSettings, ranks: int, device: torch.device
    ) -> None:
        """Take over `model`, whose trained parameters are settled, in the engine's precision."""
        self.module, self._settings, self._ranks, self._device = model, settings, ranks, device
        self._trained = [p for p in model.parameters() if p.requires_grad]
        total = sum(p.numel() for p in model.parameters())
        count = sum(p.numel() for p in self._trained)
        self._share = -(-count // ranks)
        self._bucket = max(1024, min(BUCKET_ELEMENTS, total))
        self._low = settings.precision == "bf16"
        self._masters = self._make_masters()
        self.optimizer = build_optimizer(self._masters, settings)
        # DeepSpeed's names for what the trainer looks at.
        self.basic_optimizer, self._global_grad_norm = self.optimizer, 1.0
        for group in self.optimizer.param_groups:
            # As on real CUDA tensors, where several are updated by one kernel.
            group["foreach"] = device.type == "cuda"
        # Stage 1 in bfloat16 keeps all float32 gradients, also between updates.
        whole = count if settings.zero_stage == 1 and self._low else 0
        self._whole = torch.zeros(whole, dtype=torch.float32, device=device)
        self._in_flight = min(count, ALLREDUCE_ELEMENTS)
        self._shares: dict[int, Tensor] = {}
        self._added: dict[int, Tensor] = {}
        self._buckets: list[Tensor] = []
        self._micro = 0
        together = settings.micro_batch_size * ranks
        self.accumulation_steps = max(1, settings.global_batch_size // together)
        self._update()
        for parameter in self._trained:
            parameter.register_post_accumulate_grad_hook(self._take)

    def _make_masters(self) -> list[nn.Parameter]:
        if self._settings.zero_stage == 0:
            return self._trained
        offloaded = self._settings.offload_optimizer == "cpu"
        flat = torch.empty(
            self._share, dtype=torch.float32, device="cpu" if offloaded else self._device
        )
        start = 0
        for parameter in self._trained:
            # Where DeepSpeed notes which part of a parameter this rank has, so that the average
            # finds it.
            length = min(parameter.numel(), self._share - start)
            parameter._hp_mapping = None  # type: ignore[attr-defined]
            if length > 0:
                parameter._hp_mapping = SimpleNamespace(  # type: ignore[attr-defined]
                    lp_fragment_address=SimpleNamespace(start=0),
                    hp_fragment=flat[start : start + length],
                )
                start += length
        return [nn.Parameter(flat)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass."""
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Backward pass; gradients go where the stage keeps them."""
        stage = self._settings.zero_stage
        if stage >= 2:
            # One fills while the other travels; made anew in every pass.
            dtype = torch.bfloat16 if self._low else torch.float32
            self._buckets = [
                torch.empty(self._bucket, dtype=dtype, device=self._device) for _ in range(2)
            ]
        (loss / self.accumulation_steps).backward()
        self._buckets.clear()
        for key, part in self._added.items():
            self._shares[key].add_(part)
        self._added.clear()
        self._micro += 1
        if stage < 2 and self._micro % self.accumulation_steps == 0:
            # When the last pass is through they travel: bucket by bucket, or this rank's share.
            plain = stage == 0 or self._low
            dtype = torch.bfloat16 if self._low else torch.float32
            size = self._in_flight if plain else self._share
            torch.empty(size, dtype=dtype, device=self._device)

    def _take(self, parameter: Tensor) -> None:
        """A gradient is there."""
        if self._settings.zero_stage < 2:
            return
        key, part = id(parameter), self._part(parameter).to(torch.float32, copy=True)
        parameter.grad = None
        if key not in self._shares:
            self._shares[key] = part
        elif self._low:
            self._shares[key].add_(part)
        else:
            # In float32 they are added when the pass is through.
            self._added[key] = part

    def step(self) -> None:
        """Update after the last micro batch; before that nothing."""
        if self._micro % self.accumulation_steps:
            return
        stage = self._settings.zero_stage
        if stage >= 1:
            masters = self._masters[0]
            masters.grad = self._flat_gradients().to(masters.device)
        self._update()
        for parameter in self._trained:
            parameter.grad = None

    def _flat_gradients(self) -> Tensor:
        """This rank's share of the gradients, (share,) float32; frees what it was copied from."""
        if self._whole.numel():
            return self._whole[: self._share]
        shares = list(self._shares.values())
        if self._settings.zero_stage == 1:
            shares = [self._part(parameter) for parameter in self._trained]
            for parameter in self._trained:
                parameter.grad = None
        # Each parameter's part was rounded up, the share was not.
        flat = torch.cat(shares)[: self._share]
        self._shares.clear()
        return flat

    def _part(self, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        return parameter.grad.flatten()[: -(-parameter.numel() // self._ranks)]

    def _update(self) -> None:
        """The optimizer's step; the first, at the start, makes its states."""
        for parameter in self._masters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        for parameter in self._masters:
            parameter.grad = None

    def get_global_grad_norm(self) -> float:
        """A number: nothing is computed."""
        return 1.0
