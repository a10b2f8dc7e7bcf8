"""Bytes that are alive at every moment of a piece of Python, by device, and where most were.

Every operation passes through a dispatch mode. A tensor's storage counts from the operation that
made it to its end, once, however many views of it there are; what autograd saves lives on like
everything else. So the peak is that of the allocations that the code asks for. Not in it: what
kernels take beside their results (workspaces of cuBLAS and cuDNN), CUDA's context, and what the
allocator loses to rounding and fragmentation.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

_ROOT = Path(__file__).resolve().parents[2]
# A line of these says where memory was counted, not where it was asked for.
_OWN = tuple(
    str(_ROOT / "components" / "planning" / f"{name}.py")
    for name in ("live_bytes", "fake_gpu", "zero_engine")
)
_OURS = tuple(str(_ROOT / name) + "/" for name in ("components", "flows"))
# Operators whose answer the processor waits for.
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim")


def line_of_ours() -> str:
    """Innermost line of this project on the stack, "components/models/transformer.py:210"."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_OURS) and name not in _OWN:
            return f"{name[len(str(_ROOT)) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside of the project"


class LiveBytes(TorchDispatchMode):
    """Counts inside its block.

    Attributes:
        live: bytes alive now, by device type.
        peak: most bytes that were alive at once since `restart`, by device type.
        at: the project's line at the peak of `watched`.
        waits: "operator at line" to times that the processor had to wait for the watched device.
        doubles: likewise to operations in float64 on it.
    """

    def __init__(self, watched: str = "cuda") -> None:
        """Count all devices, and say where the peak of `watched` was."""
        super().__init__()
        self.watched = watched
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.at = ""
        self.waits: Counter[str] = Counter()
        self.doubles: Counter[str] = Counter()
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def restart(self) -> None:
        """Forget the peak, and what was waited for: what lives now is the new beginning."""
        self.peak, self.at = Counter(self.live), ""
        self.waits.clear()
        self.doubles.clear()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            self._note(tensor)

    def _note(self, tensor: Tensor) -> None:
        # A wrapper (of rounded weights) has no storage; its parts were counted when they were made.
        if is_traceable_wrapper_subclass(tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        device, size = self.device_of(tensor), storage.nbytes()

        def end(_: object) -> None:
            self.live[device] -= size
            del self._storages[key]

        # The Python object lives exactly as long as the storage: torch keeps it for that.
        self._storages[key] = weakref.ref(storage, end)
        self.live[device] += size
        if self.live[device] > self.peak[device]:
            self.peak[device] = self.live[device]
            if device == self.watched:
                self.at = self._place()

    def device_of(self, tensor: Tensor) -> str:
        """Type of the device that a tensor stands for."""
        return tensor.device.type

    def _place(self) -> str:
        line = line_of_ours()
        # Set while the backward pass of a node runs; its line is then that of `backward`, or of
        # the block that is computed again.
        node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
        return line if node is None else f"{line} (backward: {node.name()})"

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = self.call(func, args, kwargs or {})
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in made:
            self._note(tensor)
        self._census(func, args, kwargs or {}, made)
        return result

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry an operation out."""
        return func(*args, **kwargs)

    def _census(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: list[Tensor]
    ) -> None:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        on_device = [tensor for tensor in given if self.device_of(tensor) == self.watched]
        if on_device and self._is_waited_for(name, args, kwargs, given, made):
            self.waits[f"{name} at {line_of_ours()}"] += 1
        if any(tensor.dtype == torch.float64 for tensor in on_device) or any(
            tensor.dtype == torch.float64 and self.device_of(tensor) == self.watched
            for tensor in made
        ):
            self.doubles[f"{name} at {line_of_ours()}"] += 1

    def _is_waited_for(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[Tensor],
        made: list[Tensor],
    ) -> bool:
        if name in _WAITS:
            return True
        # To the host, unless asked not to wait.
        if name == "_to_copy":
            return self.device_of(made[0]) == "cpu" and not kwargs.get("non_blocking")
        if name == "copy_":
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            return self.device_of(given[0]) == "cpu" and waits
        # An index by truth values has to count them first.
        return name in ("index", "index_put_") and any(
            tensor.dtype in (torch.bool, torch.uint8) for tensor in given[1:]
        )
