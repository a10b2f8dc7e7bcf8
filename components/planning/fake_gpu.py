"""A GPU that is not there: the project's own code runs on it, and nothing is computed or stored.

Tensors are torch's fake ones. They say that they are on "cuda:0", so code that asks for the device
takes the way that it takes on a GPU, and they have shapes, dtypes and storages of a size, but no
values. What leaves the device for the host in small numbers (a loss, a norm) becomes a real tensor
of ones, so that code which looks at numbers goes on.

torch's autograd engine asks the driver about every device on which a gradient flows and fails
where there is none. Only C++ is told that the tensors are on the "meta" device, which needs none;
two things that C++ decides by the device are put right here: whether `to` has anything to do, and
which kernel attention takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from components.planning.live_bytes import LiveBytes

GPU = torch.device("cuda", 0)
_META = torch.device("meta")
# Of numbers that are looked at on the host; a picture or a latent is larger.
_SMALL = 1 << 16
# Heads up to this width have a fused kernel that keeps everything in registers.
_FLASH_HEAD = 256


class FakeGpu(LiveBytes):
    """Counts what is alive on the fake GPU and on the (equally fake) host."""

    def device_of(self, tensor: Tensor) -> str:
        """Type of the device that a tensor stands for."""
        if isinstance(tensor, FakeTensor):
            return tensor.fake_device.type
        return tensor.device.type

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry an operation out on shapes."""
        if func is torch.ops.prim.device.default:
            device = args[0].fake_device
            # C++ asks; Python reads the attribute.
            return _META if device.type == "cuda" else device
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fake = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        device = torch.device(kwargs.get("device") or "cpu")
        if tensors and not fake and device.type == "cpu":
            # Numbers that have left the device; they stay real.
            with _disable_current_modes():
                return func(*args, **kwargs)
        if device.type == "meta":
            # What C++ made of the answer above.
            kwargs = {**kwargs, "device": GPU}
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            return _one(args[0].dtype)
        if name == "_to_copy" and kwargs.get("device") is not None and device.type == "cpu":
            source = args[0]
            small = source.numel() <= _SMALL and not _moved_networks
            if small and self.device_of(source) == "cuda":
                with _disable_current_modes():
                    return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        return func(*args, **kwargs)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return self.call(func, args, {})
        return super().__torch_dispatch__(func, types, args, kwargs)


def _one(dtype: torch.dtype) -> Any:
    """A number of `dtype` that is finite and true."""
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` through the operator of the kernel that a GPU would take."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    if attn_mask is None and half and query.shape[-1] <= _FLASH_HEAD:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        # The log-sum-exp that it also returns is what the kernel keeps.
        result: Tensor = flash(
            query, key, value, dropout_p, is_causal, return_debug_mask=False, scale=scale
        )[0]
        return result
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    keeps = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    attended: Tensor
    attended, *_ = efficient(query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale)
    return attended


_plain_to = Tensor.to


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to`, which would copy what is on the fake GPU already."""
    if not isinstance(tensor, FakeTensor):
        return _plain_to(tensor, *args, **kwargs)
    other = args[0] if args and isinstance(args[0], Tensor) else kwargs.pop("other", None)
    copies = bool(kwargs.pop("copy", False))
    if other is not None:
        args = (other.device, other.dtype, *args[1:])
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    options: dict[str, Any] = {"non_blocking": non_blocking, "copy": copies}
    if layout is not None:
        options["memory_format"] = layout
    if device is not None and torch.device(device).type != tensor.fake_device.type:
        options["device"] = device
    return _plain_to(tensor, dtype=dtype or tensor.dtype, **options)


def _cuda(tensor: Tensor, *_: Any, **kwargs: Any) -> Tensor:
    return _to(tensor, GPU, non_blocking=bool(kwargs.get("non_blocking")))


def _tolist(tensor: Tensor) -> Any:
    # One copy, and not a wait for every number.
    return tensor.cpu().tolist()


_moved_networks: list[nn.Module] = []
"""Those within `_apply`: their weights stay fake on the host, too, however small they are."""


def _apply(module: nn.Module, change: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which would exchange fake parameters and refuses counted ones."""
    if recurse:
        for child in module.children():
            child._apply(change)
    _moved_networks.append(module)
    try:
        for parameter in module._parameters.values():
            if parameter is not None:
                with torch.no_grad():
                    parameter.data = changed = change(parameter.data)
                if isinstance(changed, FakeTensor):
                    # `data` exchanges the storage; where that is stands beside it.
                    parameter.fake_device = changed.fake_device  # type: ignore[attr-defined]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else change(buffer)
    finally:
        _moved_networks.pop()
    return module


_REPLACED: tuple[tuple[Any, str, Any], ...] = (
    (F, "scaled_dot_product_attention", _fused_attention),
    (Tensor, "to", _to),
    (Tensor, "cuda", _cuda),
    (FakeTensor, "tolist", _tolist),
    (nn.Module, "_apply", _apply),
)
"""Not by a mode for torch functions: none is on while a checkpointed block is run once more."""


@contextmanager
def _replaced() -> Iterator[None]:
    before = [getattr(owner, name) for owner, name, _ in _REPLACED]
    for owner, name, ours in _REPLACED:
        setattr(owner, name, ours)
    try:
        yield
    finally:
        for (owner, name, _), theirs in zip(_REPLACED, before, strict=True):
            setattr(owner, name, theirs)


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Inside the block "cuda" is a device without values; tensors made there end with it."""
    with ExitStack() as stack:
        # Tensors of outside (tables, seeds) may be read.
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        live = stack.enter_context(FakeGpu())
        stack.enter_context(_replaced())
        # In this thread, so that the line at the peak is on its stack.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield live
