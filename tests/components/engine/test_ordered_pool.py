"""What comes back of an exception in a worker process."""

from __future__ import annotations

import pickle

from components.engine.ordered_pool import Failure
from components.files.weight_folders import ComponentsMissing, WeightsMissing


def test_a_failure_is_told_by_class_and_subclass_and_not_by_what_its_message_says() -> None:
    lost = WeightsMissing("VAE", "weights/vae", "hf download x")
    failure = pickle.loads(pickle.dumps(Failure.of(ComponentsMissing([lost]))))
    assert failure.is_a(ComponentsMissing)
    assert failure.is_a(WeightsMissing)
    assert not failure.is_a(ValueError)
    namesake = type("WeightsMissing", (RuntimeError,), {"__module__": "elsewhere"})
    assert not Failure.of(namesake("no")).is_a(WeightsMissing)
    assert Failure.of(namesake("no")).message == "WeightsMissing: no"


def test_a_message_is_one_line_and_empty_ones_end_with_the_class() -> None:
    assert Failure.of(RuntimeError("two\n  lines")).message == "RuntimeError: two lines"
    assert Failure.of(KeyError()).message == "KeyError"
    assert not Failure("worker killed by SIGSEGV").is_a(Exception)
