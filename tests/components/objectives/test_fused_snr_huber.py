"""The fused objective against the plain one: values, gradients, end points, odd inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.objectives.fused_snr_huber import (
    LOOP_FROM,
    cpu_loss_and_gradient,
    fused_snr_huber_loss,
    loss_and_gradient,
)
from components.objectives.snr_huber import SnrHuberSettings, snr_huber_wavelet_loss

kinds = st.sampled_from(["paper", "fm_exact"])


def _draw(
    batch: int, dtype: torch.dtype, seed: int = 0, size: tuple[int, int] = (6, 8)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, batch, 3, *size)
    velocity, latents, noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return velocity.to(dtype), latents.to(dtype), noise.to(dtype)


def _value_and_gradient(loss_of, velocity, *rest):
    leaf = velocity.detach().requires_grad_(True)
    loss = loss_of(leaf, *rest)
    # Unequal weights of the samples: the incoming gradient must be applied per sample.
    (gradient,) = torch.autograd.grad((loss * torch.arange(1, len(loss) + 1)).sum(), leaf)
    return loss.detach(), gradient


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    t=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=4),
    c=st.tuples(st.floats(0.01, 5), st.floats(0, 5)),
    alpha=st.floats(0.1, 3),
    beta=st.floats(0, 3),
    gamma=st.floats(0.1, 20),
    kind=kinds,
    band_weights=st.tuples(*(st.floats(0, 4),) * 4),
    half=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_values_and_gradients_equal_the_plain_objective_in_float64(
    seed, t, c, alpha, beta, gamma, kind, band_weights, half
) -> None:
    chosen = SnrHuberSettings(
        c_min=c[0],
        c_max=c[0] + c[1],
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        time_weight=kind,
        band_weights=band_weights,
    )
    tensors = _draw(len(t), torch.float64, seed, (2 * half[0], 2 * half[1]))
    times = torch.tensor(t, dtype=torch.float64)
    plain = _value_and_gradient(snr_huber_wavelet_loss, *tensors, times, chosen)
    fused = _value_and_gradient(fused_snr_huber_loss, *tensors, times, chosen)
    for expected, actual in zip(plain, fused, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_paths_agree_in_training_precision(dtype: torch.dtype) -> None:
    t = torch.tensor([0.0, 0.3, 0.7, 1.0])
    tensors = _draw(4, dtype, size=(16, 12))
    plain = _value_and_gradient(snr_huber_wavelet_loss, *tensors, t, SnrHuberSettings())
    fused = _value_and_gradient(fused_snr_huber_loss, *tensors, t, SnrHuberSettings())
    assert fused[0].dtype == torch.float32
    assert fused[1].dtype == dtype
    rtol = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(fused[1], plain[1], rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("kind", ["paper", "fm_exact"])
def test_analytic_gradient_passes_gradcheck(kind: str) -> None:
    velocity, latents, noise = _draw(3, torch.float64, size=(4, 2))
    chosen = SnrHuberSettings(time_weight=kind, band_weights=(1.0, 2.0, 0.5, 3.0))
    t = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda v: fused_snr_huber_loss(v, latents, noise, t, chosen), velocity.requires_grad_(True)
    )


def test_inputs_are_left_as_they_were_and_odd_sizes_refused() -> None:
    velocity, latents, noise = _draw(2, torch.float32)
    before = [x.clone() for x in (velocity, latents, noise)]
    fused_snr_huber_loss(velocity, latents, noise, torch.tensor([0.2, 0.8]), SnrHuberSettings())
    for old, new in zip(before, (velocity, latents, noise), strict=True):
        assert torch.equal(old, new)
    with pytest.raises(ValueError, match="5x8"):
        fused_snr_huber_loss(
            *_draw(1, torch.float32, size=(5, 8)), torch.zeros(1), SnrHuberSettings()
        )
    with pytest.raises(ValueError, match=r"^t:"):
        fused_snr_huber_loss(velocity, latents, noise, torch.zeros(3), SnrHuberSettings())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    half=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    c=st.floats(0.05, 5),
    band_weights=st.tuples(*(st.floats(0, 4),) * 4),
)
def test_the_loop_for_large_latents_gives_the_same_sums_and_slopes(
    seed, batch, half, c, band_weights
) -> None:
    tensors = _draw(batch, torch.float64, seed, (2 * half[0], 2 * half[1]))
    t = torch.linspace(0.1, 0.9, batch, dtype=torch.float64).view(-1, 1, 1, 1)
    threshold = c * torch.linspace(1, 2, batch, dtype=torch.float64).view(-1, 1, 1, 1)
    expected = loss_and_gradient(*tensors, t, threshold, band_weights)
    single = [x.float() for x in (*tensors, t, threshold)]
    actual = cpu_loss_and_gradient(*single, band_weights)
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual[1].double(), expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_latents_of_any_layout_give_the_same_bytes_on_any_number_of_threads(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = torch.tensor([0.1, 0.9])
    tensors = _draw(2, dtype, size=(216, 220))
    assert tensors[0].numel() >= LOOP_FROM
    plain = _value_and_gradient(snr_huber_wavelet_loss, *tensors, t, SnrHuberSettings())
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(_value_and_gradient(fused_snr_huber_loss, *tensors, t, SnrHuberSettings()))
    last = [x.to(memory_format=torch.channels_last) for x in tensors]
    found.append(_value_and_gradient(fused_snr_huber_loss, *last, t, SnrHuberSettings()))
    for loss, gradient in found:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(gradient, found[0][1])
    rtol = 1e-4 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found[0][0], plain[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[0][1], plain[1], rtol=rtol, atol=1e-9)


def test_large_latents_of_odd_or_different_sizes_are_refused() -> None:
    t = torch.tensor([0.1, 0.9])
    odd = _draw(2, torch.float32, size=(217, 220))
    with pytest.raises(ValueError, match="217x220"):
        fused_snr_huber_loss(*odd, t, SnrHuberSettings())
    velocity, latents, noise = _draw(2, torch.float32, size=(216, 220))
    with pytest.raises(RuntimeError, match="must match"):
        fused_snr_huber_loss(velocity, latents.mT.contiguous(), noise, t, SnrHuberSettings())


def test_the_slopes_of_large_latents_serve_one_backward_pass() -> None:
    velocity, latents, noise = _draw(2, torch.float32, size=(216, 220))
    velocity.requires_grad_(True)
    t = torch.tensor([0.1, 0.9])
    loss = fused_snr_huber_loss(velocity, latents, noise, t, SnrHuberSettings()).sum()
    torch.autograd.grad(loss, velocity, retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(loss, velocity)


@pytest.mark.slow
def test_compiled_kernel_gives_the_same_values_and_gradients() -> None:
    t = torch.tensor([0.0, 0.4, 1.0])
    for size in ((6, 8), (16, 4)):
        tensors = _draw(3, torch.float32, size=size)
        plain = _value_and_gradient(snr_huber_wavelet_loss, *tensors, t, SnrHuberSettings())
        fused = _value_and_gradient(
            lambda *a: fused_snr_huber_loss(*a, compiled=True), *tensors, t, SnrHuberSettings()
        )
        torch.testing.assert_close(fused[0], plain[0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(fused[1], plain[1], rtol=1e-5, atol=1e-9)
