"""Choosing Ray for the engine, without starting it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from components.engine.map_items import EngineLimits, map_items
from components.engine.ordered_pool import RayOptions
from components.engine.ray_pool import EngineUnavailable, actor_count
from components.settings.schema import Settings, SettingsError, parse_settings
from components.telemetry.rates import Throughput

OPTIONS = RayOptions(address=None, actors=None, gpus_per_actor=0.0, local_cpus=2)
ON_RAY = EngineLimits(workers=2, timeout_s=5, memory_mb=512, retries=0, ray=OPTIONS)


def settings(root: Path, **runtime: object) -> Settings:
    values = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    values["runtime"] |= runtime
    return parse_settings(values)


def test_the_default_engine_is_local(root: Path) -> None:
    assert EngineLimits.of(settings(root)).ray is None


def test_settings_become_options_and_gpus_are_for_networks_alone(root: Path) -> None:
    chosen = settings(
        root, engine="ray", ray_address="10.0.0.1:6379", device="cuda", gpus_per_actor=0.5
    )
    of_cpu = EngineLimits.of(chosen)
    assert of_cpu.ray == RayOptions("10.0.0.1:6379", None, 0.0, 2)
    of_gpu = EngineLimits.for_networks(chosen, timeout_s=600.0, memory_mb=2**24)
    assert of_gpu.ray == RayOptions("10.0.0.1:6379", None, 0.5, 2, batch_items=1)
    assert (of_gpu.timeout_s, of_gpu.memory_mb, of_gpu.workers) == (600.0, 2**24, 1)
    on_cpu = settings(root, engine="ray", gpus_per_actor=0.0)
    limits = EngineLimits.for_networks(on_cpu, timeout_s=1.0, memory_mb=1)
    assert limits.ray == RayOptions(None, None, 0.0, 2, batch_items=1)
    assert limits.workers == on_cpu.runtime.workers
    # What a network asks for is the least, not the most.
    signals = on_cpu.signals
    assert (limits.timeout_s, limits.memory_mb) == (signals.timeout_s, signals.memory_mb)


@pytest.mark.parametrize(("actors", "cpus"), [(None, 2), (1, 2), (5, 5)])
def test_an_own_instance_has_a_cpu_for_each_actor(
    root: Path, actors: int | None, cpus: int
) -> None:
    options = EngineLimits.of(settings(root, engine="ray", actors=actors)).ray
    assert options is not None
    assert (options.actors, options.local_cpus) == (actors, cpus)


@pytest.mark.parametrize(
    ("runtime", "problem"),
    [
        ({"engine": "dask"}, "runtime.engine = 'dask'"),
        ({"ray_address": "ray://head:10001"}, "runtime.ray_address"),
        ({"actors": 0}, "runtime.actors = 0"),
        ({"gpus_per_actor": 1.5}, "whole number"),
        ({"engine": "ray", "device": "cuda", "gpus_per_actor": 0.0}, "must be above 0"),
    ],
)
def test_bad_engine_settings_are_refused(
    root: Path, runtime: dict[str, object], problem: str
) -> None:
    with pytest.raises(SettingsError, match=problem):
        settings(root, **runtime)


@pytest.mark.parametrize(
    ("resources", "gpus", "actors", "expected"),
    [
        ({"CPU": 8.0}, 0.0, None, 8),
        ({"CPU": 8.0}, 0.0, 3, 3),
        ({"CPU": 64.0, "GPU": 8.0}, 1.0, None, 8),
        ({"CPU": 64.0, "GPU": 2.0}, 0.1, None, 20),
        ({"CPU": 4.0, "GPU": 8.0}, 0.5, None, 4),
    ],
)
def test_the_cluster_bounds_the_number_of_actors(
    resources: dict[str, float], gpus: float, actors: int | None, expected: int
) -> None:
    options = replace(OPTIONS, gpus_per_actor=gpus, actors=actors)
    assert actor_count(resources, options) == expected


def test_a_cluster_without_gpus_is_said_at_once() -> None:
    with pytest.raises(EngineUnavailable, match="needs 1 CPU and 1 GPU"):
        actor_count({"CPU": 8.0}, replace(OPTIONS, gpus_per_actor=1.0))


def test_a_missing_package_is_one_error_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # As Python itself marks a module that is not to be found.
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    schema = pa.schema([("image_id", pa.string()), ("value", pa.int64()), ("error", pa.string())])
    with pytest.raises(EngineUnavailable) as caught:
        map_items(
            actor_count,
            ["a"],
            [1],
            stage="any",
            key={},
            schema=schema,
            state_dir=tmp_path,
            limits=ON_RAY,
        )
    assert "python -m pip install -e '.[ray]'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ray_is_not_imported_until_it_is_chosen() -> None:
    code = (
        "import sys\n"
        "import components.engine.map_items, components.engine.ray_pool\n"
        "sys.exit('ray' in sys.modules)"
    )
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_the_note_tells_rates_and_counts_reasons() -> None:
    throughput = Throughput(pending=10)
    throughput.see({"width": 4000, "height": 3000, "integrity": "ok"})
    throughput.see({"integrity": "truncated"})
    throughput.see({"error": "quarantined: worker killed by SIGKILL"})
    note = throughput.note()
    assert "images/s" in note
    assert "MP/s" in note
    assert "left" in note
    assert note.endswith("damaged 1, quarantined 1")
