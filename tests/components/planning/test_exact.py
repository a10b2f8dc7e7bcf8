"""The stages' own code on a GPU that is not there, against real tensors and the formulas."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from components.models.loading.memory_modes import parse_memory
from components.planning import exact
from components.planning.fake_gpu import GPU, fake_gpu
from components.planning.live_bytes import LiveBytes
from components.planning.model_shapes import FluxShape, T5Shape, networks
from components.planning.rounded import saved_bytes
from components.planning.stage_memory import generate_bytes, stage_memory
from components.planning.transformer import Transformer

GIB = 2**30


@pytest.fixture
def transformer(profile, tmp_path):
    """Networks and settings of a profile, without any weights folder; changes as `profile`'s."""

    def make(name: str, shape: FluxShape | None = None, **changes: object) -> Transformer:
        settings = profile(name, **changes)
        nets = networks(settings, tmp_path)
        if shape is not None:
            nets = dataclasses.replace(nets, transformer=shape)
        return Transformer(nets, settings)

    return make


def step(device: torch.device) -> None:
    """Forward, backward and an update, with a block that is run twice."""
    with device:
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        x = torch.ones(32, 64)
    y = checkpoint(model, x, use_reentrant=False, preserve_rng_state=False)
    y.square().mean().backward()
    optimizer.step()


def test_fake_and_real_tensors_are_counted_alike():
    with LiveBytes("cpu") as real:
        step(torch.device("cpu"))
    with fake_gpu() as fake:
        step(GPU)
    assert fake.peak["cuda"] == pytest.approx(real.peak["cpu"], rel=0.02)
    assert fake.live["cuda"] == real.live["cpu"] == 0
    # Weights, gradients and two moments of 64 x 64, and what the update makes of them.
    assert real.peak["cpu"] >= 4 * 4 * 4 * 64 * 64


def test_views_count_once_and_freed_tensors_no_more():
    with LiveBytes("cpu") as live:
        x = torch.zeros(1000)
        views = [x.view(10, 100), x[5:], x[None]]
        assert live.live["cpu"] == 4000
        del x
        assert live.live["cpu"] == 4000
        views.clear()
        assert live.live["cpu"] == 0
        assert live.peak["cpu"] == 4000


def test_a_fake_gpu_answers_as_one():
    with fake_gpu() as live:
        with GPU:
            x = torch.ones(3, 4)
        assert x.device.type == "cuda"
        # Nothing to do, hence no copy.
        for same in (x.to("cuda"), x.to(GPU), x.to(x), x.float(), x.cuda(), x.to(torch.float32)):
            assert same is x
        host = torch.ones(5)
        assert host.device.type == "cpu"
        assert host.to(GPU).device.type == "cuda"
        assert not live.waits
        assert float(x.sum()) == 1.0
        assert x[:1].tolist() == [[1.0, 1.0, 1.0, 1.0]]
        assert sum(live.waits.values()) == 2
        assert not live.doubles
        x.double()
        assert sum(live.doubles.values()) == 1
    assert "test_exact" not in str(torch.Tensor.to)


def test_attention_keeps_what_the_fused_kernel_keeps():
    with fake_gpu() as live:
        with GPU:
            q = torch.ones(1, 2, 256, 64, dtype=torch.bfloat16, requires_grad=True)
        live.restart()
        before = live.live["cuda"]
        y = nn.functional.scaled_dot_product_attention(q, q, q)
        # The result and the log-sum-exp, not 256 x 256 weights.
        assert live.live["cuda"] - before < 2 * q.nbytes
        y.float().sum().backward()
        assert q.grad.device.type == "cuda"


@pytest.mark.parametrize("name", ["latents", "text_embeddings", "vae", "dit_stage1", "generate"])
def test_formula_and_trace_of_the_embedded_profile_agree_within_3_percent(transformer, name):
    subject = transformer("embedded")
    size = subject.settings.generate.sizes[0]
    traces = {
        "latents": lambda: exact.trace_latents(subject, size),
        "text_embeddings": lambda: exact.trace_text(subject),
        "vae": lambda: exact.trace_vae(subject),
        "dit_stage1": lambda: exact.trace_training(subject, "dit_stage1", size),
        "generate": lambda: exact.trace_generate(subject, size),
    }[name]()
    peak = max(trace.peak_bytes for trace in traces)
    formula = stage_memory(name, subject, [size]).memory.total
    assert formula == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_what_an_optimizer_holds_is_planned_and_traced_alike(transformer, optimizer):
    subject = transformer(
        "single-gpu",
        FluxShape(1, 1),
        dit_stage1__optimizer=optimizer,
        dit_stage1__zero_stage=0,
        dit_stage1__precision="fp32",
        dit_stage1__adapter=None,
        dit_stage1__gradient_checkpointing="blocks",
    )
    (trace,) = exact.trace_training(subject, "dit_stage1", (512, 512))
    planned = stage_memory("dit_stage1", subject, [(512, 512)]).memory
    held = planned.weights + planned.optimizer + planned.average
    assert trace.held_bytes == pytest.approx(held, rel=1e-6)
    assert planned.total == pytest.approx(trace.peak_bytes, rel=0.03)


@pytest.mark.parametrize("kind", ["none", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_base_that_waits_on_the_host_leaves_one_block_on_the_gpu(transformer, kind):
    """Also what frozen layers do not keep: their inputs."""
    shape, edge = FluxShape(1, 3), (2048, 2048)
    changes = {
        "dit_stage1__gradient_checkpointing": "blocks",
        "models__transformer__quantisation": kind,
    }
    traces, plans = [], []
    for waits in (False, True):
        subject = transformer("single-gpu", shape, **changes, dit_stage1__offload_base=waits)
        (trace,) = exact.trace_training(subject, "dit_stage1", edge)
        traces.append(trace)
        plans.append(stage_memory("dit_stage1", subject, [edge]).memory)
    blocks = [
        inputs * outputs
        for name, inputs, outputs in shape.linear_layers
        if "transformer_blocks." in name
    ]
    item = 2 if kind == "none" else 1
    # None is there before the step.
    left = traces[0].held_bytes - traces[1].held_bytes
    assert left == pytest.approx(item * sum(blocks), rel=0.01)
    for trace, planned in zip(traces, plans, strict=True):
        # An upper bound: all widened weights of the widest block count, of a few blocks.
        assert -0.03 < planned.total / trace.peak_bytes - 1 < 0.25
    assert plans[1].weights < plans[0].weights - 0.4 * item * sum(blocks)


def test_one_float32_photograph_of_4096_px_takes_the_known_10_gib(transformer):
    (trace,) = exact.trace_latents(transformer("single-gpu"), (4096, 4096))
    assert trace.working_bytes == pytest.approx(10.19 * GIB, rel=0.001)
    assert trace.at.startswith("components/models/autoencoder_f16.py:")
    planned = stage_memory("latents", transformer("single-gpu"), [(4096, 4096)])
    assert planned.processes == 2
    assert planned.memory.total == pytest.approx(trace.peak_bytes, rel=0.001)


def test_16_captions_take_what_t5_xxl_needs(transformer):
    (trace,) = exact.trace_text(transformer("single-gpu"))
    planned = stage_memory("text_embeddings", transformer("single-gpu"), [(4096, 4096)])
    assert trace.held_bytes == pytest.approx(4 * (T5Shape().parameters + 123_060_480), rel=1e-4)
    assert planned.memory.total == pytest.approx(trace.peak_bytes, rel=0.001)
    # Two workers hold one each, and the stage's own process one more on the host.
    assert planned.gpu_bytes == 2 * planned.memory.total
    assert planned.host_bytes == 3 * planned.memory.weights


@pytest.mark.parametrize(
    ("name", "policy", "above"),
    [
        ("paper", "none", 0.03),
        ("paper", "blocks", 0.03),
        ("paper", "selective", 0.03),
        # Frozen layers keep less, which these few blocks show most: an upper bound.
        ("single-gpu", "none", 0.35),
        ("single-gpu", "blocks", 0.2),
        ("single-gpu", "selective", 0.2),
    ],
)
def test_a_step_of_a_few_full_size_blocks_agrees_within_3_percent(transformer, name, policy, above):
    subject = transformer(name, FluxShape(1, 1), dit_stage1__gradient_checkpointing=policy)
    (trace,) = exact.trace_training(subject, "dit_stage1", (4096, 4096))
    planned = stage_memory("dit_stage1", subject, [(4096, 4096)]).memory
    assert trace.held_bytes == pytest.approx(
        planned.weights + planned.optimizer + planned.average, rel=0.005
    )
    assert -0.03 < planned.total / trace.peak_bytes - 1 < above
    # The losses of all ranks are read once a step, and nothing else is waited for.
    assert [place.partition(":")[0] for place in trace.waits] == [
        "_to_copy at components/training/distributed/ranks.py"
    ]
    assert not trace.doubles


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "single-gpu"])
def test_a_step_of_the_12b_network_agrees_within_3_percent(transformer, name):
    (trace,) = exact.trace_training(transformer(name), "dit_stage1", (4096, 4096))
    planned = stage_memory("dit_stage1", transformer(name), [(4096, 4096)]).memory
    assert planned.total == pytest.approx(trace.peak_bytes, rel=0.03)
    assert exact.host_peak_bytes() < 3 * GIB


@pytest.mark.parametrize("backbone", ["flux", pytest.param("sd3", marks=pytest.mark.slow)])
def test_models_that_take_turns_on_the_gpu_are_there_alone(transformer, backbone):
    def traced(*memory):
        changes = {"generate__memory": list(memory), "models__transformer__backbone": backbone}
        subject = transformer("embedded", **changes)
        size = subject.settings.generate.sizes[0]
        traces = exact.trace_generate(subject, size)
        formula = stage_memory("generate", subject, [size]).memory.total
        assert formula == pytest.approx(max(one.peak_bytes for one in traces), rel=0.03)
        return traces

    together, alone = traced(), traced("model-offload")
    assert [one.what for one in alone] == [one.what for one in together]
    for turn, all_there in zip(alone, together, strict=True):
        # The networks of the other turns wait on the host, and what works is the same.
        assert turn.peak_bytes < all_there.peak_bytes - 0.3 * all_there.held_bytes
        assert turn.host_bytes > 0.8 * all_there.held_bytes
    # Nothing but small tables is there between the turns.
    assert alone[2].held_bytes < 0.01 * together[2].held_bytes


def test_sampling_rounded_weights_widens_one_layer_at_a_time(transformer):
    # In tiles the decoder needs less than sampling, whose peak is the run's.
    modes = parse_memory("vae-tiling")
    plain, rounded = (
        transformer("single-gpu", models__transformer__quantisation=kind)
        for kind in ("none", "int8")
    )
    # The six modulations of a double block: 3,072 to 18,432 in bf16.
    widest = 2 * 3072 * 18432
    saved = saved_bytes(rounded, "int8", 2)
    assert generate_bytes(rounded, modes) == generate_bytes(plain, modes) - saved + widest


def test_sampling_and_decoding_at_4096_px_agree_within_3_percent(transformer):
    subject = transformer("single-gpu", FluxShape(1, 1))
    traces = exact.trace_generate(subject, (4096, 4096), with_encoders=False)
    sampled, decoded = traces[-2:]
    assert decoded.working_bytes == pytest.approx(6.0 * GIB, rel=0.01)
    # The known 23.8 GiB of the whole network, 22.2 of them weights.
    assert sampled.working_bytes == pytest.approx((23.8 - 22.17) * GIB, rel=0.03)
