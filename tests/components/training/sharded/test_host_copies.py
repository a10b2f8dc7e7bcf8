from __future__ import annotations

import io
from collections import OrderedDict

import pytest
import torch

from components.training.sharded.host_copies import HostCopies


def saved(state: object) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def test_a_copy_keeps_what_training_changes_afterwards():
    weights = torch.arange(4.0)
    state = {"a": [weights, (weights[1:], 3)], "b": OrderedDict(x=weights, y=None), "c": {1, 2}}
    copied = HostCopies().take("file", state)
    weights.zero_()
    state["c"].add(3)
    assert copied["a"][0].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert copied["a"][1][0].tolist() == [1.0, 2.0, 3.0]
    assert copied["a"][1][1] == 3
    assert isinstance(copied["b"], OrderedDict)
    assert copied["b"]["x"] is copied["a"][0]
    assert copied["c"] == {1, 2}


def test_memory_is_used_again_under_the_same_name_and_shape():
    copies = HostCopies()
    first = copies.take("file", {"w": torch.ones(3)})["w"]
    assert copies.take("file", {"w": torch.zeros(3)})["w"] is first
    assert copies.take("other", {"w": torch.zeros(3)})["w"] is not first
    assert copies.take("file", {"w": torch.zeros(4)})["w"].shape == (4,)


def test_first_and_later_copies_are_stored_with_the_same_bytes():
    copies = HostCopies()
    state = {"w": torch.randn(5, 3).t(), "names": ["w", "w"], "step": torch.tensor(2)}
    first = saved(copies.take("file", state))
    assert saved(copies.take("file", state)) == first
    assert saved(HostCopies().take("file", state)) == first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_from_cuda_is_pinned_and_unmoved_by_the_next_step():
    weights = torch.ones(1 << 22, device="cuda")
    copies = HostCopies()
    copied = copies.take("file", weights)
    fence = copies.fence()
    weights.zero_()
    fence()
    assert copied.is_pinned()
    assert bool((copied == 1).all())
