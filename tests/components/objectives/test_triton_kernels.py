"""The objective as torch.compile generates it for a GPU, compiled for an H100 without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Traced on the CPU, because a machine without a driver cannot even index a tensor of a GPU; lowered
# for tensors that claim to be on one; its kernels compiled to machine code and never loaded.
PROGRAM = """
import re
from types import SimpleNamespace
from unittest import mock

import torch
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import decomposition
from torch._inductor.codecache import PyCodeCache
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from components.objectives.fused_snr_huber import loss_and_gradient

H100 = SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    regs_per_multiprocessor=65536, total_memory=80 * 2**30, L2_cache_size=50 * 2**20,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
)
properties = staticmethod(lambda *_: H100)
for where, name, value in (
    (torch.cuda, "is_available", lambda: True),
    (torch.cuda, "device_count", lambda: 1),
    (torch.cuda, "current_device", lambda: 0),
    (torch.cuda, "get_device_properties", lambda *_: H100),
    (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
    (CudaInterface, "is_available", staticmethod(lambda: True)),
    (CudaInterface, "current_device", staticmethod(lambda: 0)),
    (CudaInterface, "get_compute_capability", staticmethod(lambda *_: 90)),
    (CudaInterface, "get_device_properties", properties),
    (CudaInterface.Worker, "get_device_properties", properties),
    # Kernels ask for the real driver when they are read.
    (triton_helpers, "set_driver_to_gpu", lambda: None),
):
    mock.patch.object(where, name, value).start()
driver.set_active(
    SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_device_interface=lambda: torch.cuda,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
)

sizes = [(2, 16, 64, 96)] * 3 + [(2, 1, 1, 1)] * 2
weighted = lambda *x: loss_and_gradient(*x, (1.0, 2.0, 3.0, 4.0))
traced = make_fx(
    torch.func.functionalize(weighted, remove="mutations"),
    decomposition_table=decomposition.select_decomp_table(),
)(*(torch.rand(size) for size in sizes))
for node in traced.graph.nodes:
    if "device" in node.kwargs:
        node.kwargs = node.kwargs | {"device": torch.device("cuda", 0)}
traced.recompile()
mode = FakeTensorMode(allow_non_fake_inputs=True)
with mode:
    inputs = [torch.empty(size, device="cuda") for size in sizes]
FakeTensorProp(traced, mode).propagate_dont_convert_inputs(*inputs)
lowered = GraphLowering(traced, example_inputs=inputs)
with V.set_graph_handler(lowered), V.set_fake_mode(mode), DebugContext():
    lowered.run(*inputs)
    code, _ = lowered.codegen()
quotes = "'" * 3
pattern = rf"async_compile\\.triton\\('(\\w+)', {quotes}\\n(.*?){quotes}, device_str='cuda'\\)"
for name, source in re.findall(pattern, code.value, re.DOTALL):
    kernel = getattr(PyCodeCache.load(source), name)
    kernel.precompile(warm_cache_only=True)
    print("compiled", name)
"""
MOST_KERNELS = 6
"""Rows of the transform, bands with their slopes, two small sums, and two that put slopes in place;
torch's operators are about forty."""


@pytest.mark.slow
def test_a_few_kernels_of_the_objective_compile_for_sm_90(tmp_path: Path) -> None:
    caches = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    own = {name: str(tmp_path / folder) for name, folder in caches.items()}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=os.environ | own,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = done.stdout.split("compiled ")[1:]
    assert 1 <= len(kernels) <= MOST_KERNELS, kernels
    assemblies = [path.read_text() for path in (tmp_path / "triton").rglob("*.ptx")]
    # The compiler tries several block sizes of each.
    assert len(assemblies) >= len(kernels)
    assert all(".target sm_90" in text for text in assemblies)
    assert all(path.stat().st_size for path in (tmp_path / "triton").rglob("*.cubin"))
