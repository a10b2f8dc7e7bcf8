"""The machine's load is sampled beside a stage, under MLflow's names."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from components.telemetry.metric_log import MetricLog
from flows.records.system_metrics import SystemSampler, gpu_metrics, watched


def test_a_short_stage_has_one_sample_and_a_second_start_counts_on(tmp_path: Path) -> None:
    file = tmp_path / "system.jsonl"
    for _ in range(2):
        with watched(file, tmp_path):
            pass
    rows = list(MetricLog(file).rows())
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert row["system/system_memory_usage_megabytes"] > 0
        assert 0 <= row["system/cpu_utilization_percentage"] <= 100
        assert 0 <= row["system/disk_usage_percentage"] <= 100


def test_the_stages_own_memory_and_time_are_counted(tmp_path: Path) -> None:
    sampler = SystemSampler(tmp_path)
    sampler.sample()
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    sample = sampler.sample()
    assert sample["system/stage_cpu_percentage"] > 0
    resident = psutil.Process().memory_info().rss / 1e6
    assert sample["system/stage_memory_megabytes"] >= 0.5 * resident


def test_what_the_stage_raises_goes_through_and_its_last_sample_stays(tmp_path: Path) -> None:
    file = tmp_path / "system.jsonl"
    with pytest.raises(ValueError, match="no"), watched(file, tmp_path):
        raise ValueError("no")
    assert len(list(MetricLog(file).rows())) == 1


def test_gpus_are_read_from_the_drivers_program() -> None:
    text = "0, 97, 40960, 81920, 512.25\n1, 0, 0, 81920, [N/A]\n"
    assert gpu_metrics(text) == {
        "gpu_0_utilization_percentage": 97.0,
        "gpu_0_memory_usage_megabytes": 40960 * 2**20 / 1e6,
        "gpu_0_memory_usage_percentage": 50.0,
        "gpu_0_power_usage_watts": 512.25,
        "gpu_1_utilization_percentage": 0.0,
        "gpu_1_memory_usage_megabytes": 0.0,
        "gpu_1_memory_usage_percentage": 0.0,
    }
    assert gpu_metrics("") == {}
