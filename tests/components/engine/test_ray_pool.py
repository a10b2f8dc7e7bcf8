"""The engine in actors of a real Ray instance: equal bytes, isolation, resume, nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest
from PIL import Image

from components.corpus.derivatives import read_derivatives
from components.corpus.people import evidence as people
from components.corpus.people.nsfw import file_sha256, nudenet_weights
from components.engine import ray_pool
from components.engine.map_items import EngineLimits, join_shards, map_items
from components.engine.ordered_pool import RayOptions
from components.signals import candidate as signals

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
OPTIONS = RayOptions(address=None, actors=2, gpus_per_actor=0.0, local_cpus=2)
LOCAL = EngineLimits(workers=2, timeout_s=60, memory_mb=2048, retries=0)
ON_RAY = replace(LOCAL, ray=OPTIONS)

# Actors import it by name, so it is a module.
WORK = textwrap.dedent(
    """
    import os, signal, sys, time
    from functools import cache
    from pathlib import Path
    import pyarrow as pa
    from components.engine.map_items import EngineLimits, join_shards, map_items
    from components.engine.ordered_pool import RayOptions

    SCHEMA = pa.schema([("image_id", pa.string()), ("value", pa.int64()), ("error", pa.string())])

    @cache
    def model(folder):
        with open(Path(folder) / "loads.txt", "a") as file:
            file.write("loaded\\n")
        return 1

    def work(payload):
        kind, number, folder = payload
        with open(Path(folder) / "calls.txt", "a") as file:
            file.write(f"{number}\\n")
        if kind == "exit":
            os._exit(3)
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if kind == "hang":
            time.sleep(60)
        if kind == "raises":
            raise RuntimeError(f"no {number}")
        if kind == "greedy":
            return {"value": len(bytearray(1 << 31))}
        if kind == "actor":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        if kind == "slow":
            time.sleep(0.2)
        if kind == "model":
            return {"value": number * number * model(folder)}
        return {"value": number * number}

    def go(folder, kinds, on_ray, workers=2, retries=0, timeout_s=4):
        options = RayOptions(address=None, actors=workers, gpus_per_actor=0.0, local_cpus=workers)
        limits = EngineLimits(
            workers=workers, timeout_s=timeout_s, memory_mb=512, retries=retries,
            ray=options if on_ray else None,
        )
        folder.mkdir(exist_ok=True)
        shards = map_items(
            work,
            [f"id{n}" for n in range(len(kinds))],
            ((kind, n, str(folder)) for n, kind in enumerate(kinds)),
            stage="squares",
            key={},
            schema=SCHEMA,
            state_dir=folder / "shards",
            limits=limits,
        )
        join_shards(shards, SCHEMA, folder / "out.parquet")
    """
)
DRIVER = """
import sys
from pathlib import Path
from ray_squares_work import go

if __name__ == "__main__":
    go(Path(sys.argv[1]), ["slow"] * 64, on_ray=sys.argv[2] == "ray")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    (folder / "ray_squares_work.py").write_text(WORK)
    (folder / "driver.py").write_text(DRIVER)
    return folder


@pytest.fixture(scope="module")
def work(folder: Path) -> Iterator[ModuleType]:
    """The module of `WORK` beside a Ray instance, made before any test closes the network."""
    sys.path.insert(0, str(folder))
    ray = ray_pool.connect(OPTIONS)
    yield import_module("ray_squares_work")
    ray.shutdown()
    sys.path.remove(str(folder))


def lines(path: Path) -> list[str]:
    return path.read_text().split()


def test_an_own_instance_listens_on_the_loopback_alone(work: ModuleType) -> None:
    import ray

    (node,) = ray.nodes()
    assert node["NodeManagerAddress"] == "127.0.0.1"
    assert os.environ["RAY_AUTH_MODE"] == "token"
    # Sockets of Ray's servers, from the kernel: 0A is LISTEN.
    ours = {socket for process in ray_processes() for socket in sockets(process)}
    addresses = {
        fields[1].split(":")[0]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for fields in map(str.split, Path(table).read_text().splitlines()[1:])
        if fields[3] == "0A" and fields[9] in ours
    }
    assert addresses
    assert addresses <= {
        "0100007F",
        "0000000000000000FFFF00000100007F",
        "00000000000000000000000001000000",
    }


def ray_processes() -> list[Path]:
    """Ray's servers that this process started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "comm").read_text().startswith(("raylet", "gcs_server")):
                parent = (process / "stat").read_text().rsplit(")", 1)[1].split()[1]
                if int(parent) == os.getpid():
                    found.append(process)
        except OSError:
            continue
    return found


def sockets(process: Path) -> set[str]:
    found = set()
    for descriptor in (process / "fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue
        if target.startswith("socket:["):
            found.add(target[len("socket:[") : -1])
    return found


@pytest.fixture(scope="module")
def photos(root: Path, folder: Path) -> list[Path]:
    """Small copies of real photographs, one of them cut short."""
    copies = []
    for path in sorted((root / "data" / "sample").glob("*.jpg"))[:6]:
        with Image.open(path) as image:
            image.thumbnail((900, 900))
            copies.append(folder / path.name)
            image.convert("RGB").save(copies[-1], quality=92)
    copies[2].write_bytes(copies[2].read_bytes()[:20_000])
    return copies


def measure(photos: list[Path], state_dir: Path, limits: EngineLimits) -> list[Path]:
    return map_items(
        signals.measure_candidate,
        [path.name for path in photos],
        [signals.Candidate(path, 240, 800.0, 256, 100.0) for path in photos],
        stage="signals",
        key={},
        schema=signals.CANDIDATE_SCHEMA,
        state_dir=state_dir,
        limits=limits,
    )


def same_files(one: list[Path], other: list[Path]) -> bool:
    return [(path.name, path.read_bytes()) for path in one] == [
        (path.name, path.read_bytes()) for path in other
    ]


def test_shards_of_real_photographs_are_the_local_engines_byte_for_byte(
    work: ModuleType, photos: list[Path], tmp_path: Path
) -> None:
    local = measure(photos, tmp_path / "local", LOCAL)
    assert same_files(measure(photos, tmp_path / "ray", ON_RAY), local)
    integrity = [row["integrity"] for shard in local for row in pq.read_table(shard).to_pylist()]
    assert len(integrity) == len(photos)
    assert integrity.count("ok") == len(photos) - 1


def test_nudenet_in_actors_scores_as_it_does_in_processes(
    work: ModuleType, photos: list[Path], tmp_path: Path
) -> None:
    digest = file_sha256(nudenet_weights())
    plan = people.LookPlan(detector="nudenet", nsfw="nudenet", weights_digest=digest)
    shards = measure(photos, tmp_path / "signals", LOCAL)
    join_shards(shards, signals.DERIVATIVES_SCHEMA, tmp_path / "derivatives.parquet")
    pictures = list(read_derivatives(tmp_path / "derivatives.parquet"))
    results = {}
    for name, limits in (("local", LOCAL), ("ray", ON_RAY)):
        results[name] = map_items(
            partial(people.look_at, plan=plan),
            [picture.image_id for picture in pictures],
            pictures,
            stage="people",
            key=plan.key(),
            schema=people.PEOPLE_SCHEMA,
            state_dir=tmp_path / name,
            limits=limits,
        )
    assert same_files(results["ray"], results["local"])
    scores = [pq.read_table(shard)["nsfw_score"][0].as_py() for shard in results["ray"]]
    assert None not in scores


def test_every_kind_of_failure_costs_its_item_and_reads_as_it_does_locally(
    work: ModuleType, tmp_path: Path
) -> None:
    kinds = ["ok", "exit", "ok", "killed", "segfault", "hang", "raises", "greedy", *["ok"] * 24]
    for name, on_ray in (("local", False), ("ray", True)):
        work.go(tmp_path / name, kinds, on_ray)
    local, ray = ((tmp_path / name / "out.parquet") for name in ("local", "ray"))
    assert ray.read_bytes() == local.read_bytes()
    rows = pq.read_table(ray).to_pylist()
    assert sum(row["error"] is not None for row in rows) == 6
    # A failed item took no neighbour with it, and nothing was computed twice.
    assert sorted(map(int, lines(tmp_path / "ray" / "calls.txt"))) == list(range(len(kinds)))


@pytest.mark.parametrize("retries", [0, 1])
def test_an_item_that_kills_its_actor_is_found_and_its_neighbours_are_computed(
    work: ModuleType, tmp_path: Path, retries: int
) -> None:
    kinds = ["ok"] * 40
    kinds[5] = kinds[6] = kinds[33] = "actor"
    work.go(tmp_path / "a", kinds, on_ray=True, retries=retries, timeout_s=30)
    rows = pq.read_table(tmp_path / "a" / "out.parquet").to_pylist()
    lost = "quarantined: the actor or its machine was lost"
    assert {n: row["error"] for n, row in enumerate(rows) if row["error"]} == {
        5: lost,
        6: lost,
        33: lost,
    }
    assert [row["value"] for n, row in enumerate(rows) if kinds[n] == "ok"] == [
        n * n for n in range(40) if kinds[n] == "ok"
    ]
    # Once in company and then alone, once per attempt.
    tries = [int(line) for line in lines(tmp_path / "a" / "calls.txt")]
    assert all(1 <= tries.count(n) <= retries + 2 for n in (5, 6, 33))


def test_an_actor_loads_its_model_once(work: ModuleType, tmp_path: Path) -> None:
    work.go(tmp_path / "a", ["model"] * 60, on_ray=True)
    assert 1 <= len(lines(tmp_path / "a" / "loads.txt")) <= 2


def test_shards_of_one_engine_are_finished_work_for_the_other(
    work: ModuleType, tmp_path: Path
) -> None:
    work.go(tmp_path / "a", ["ok"] * 32, on_ray=False)
    whole = (tmp_path / "a" / "out.parquet").read_bytes()
    for shard in sorted((tmp_path / "a" / "shards").iterdir())[:5]:
        shard.unlink()
    (tmp_path / "a" / "calls.txt").unlink()
    work.go(tmp_path / "a", ["ok"] * 32, on_ray=True)
    assert (tmp_path / "a" / "out.parquet").read_bytes() == whole
    assert len(lines(tmp_path / "a" / "calls.txt")) == 10


def test_a_function_that_cannot_be_imported_is_an_error_and_no_endless_restart(
    work: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "only_here.py").write_text("def work(item):\n    return item\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    function = import_module("only_here").work
    (tmp_path / "only_here.py").unlink()
    with pytest.raises(ray_pool.WorkersDoNotStart, match="worker processes do not start"):
        list(ray_pool.RayPool(function, ON_RAY, OPTIONS).map([1]))


def test_no_cluster_at_the_address_is_one_line(folder: Path) -> None:
    code = (
        "from components.engine.ray_pool import RayOptions, connect\n"
        "connect(RayOptions('127.0.0.1:1', None, 0.0, 1))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "runtime.ray_address: no connection to a Ray cluster at 127.0.0.1:1" in last
    assert "ray start --head" in last


def alive(marker: Path) -> list[str]:
    """Names of processes that were started under `marker`, Ray's included."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(marker).encode() in (process / "environ").read_bytes():
                found.append((process / "comm").read_text().strip())
        except OSError:
            continue
    return found


@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_a_killed_driver_leaves_no_process_and_resumes(
    folder: Path, tmp_path: Path, how: str
) -> None:
    target = tmp_path / "a"
    marked = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "ENGINE_TEST": str(target)}
    command = [sys.executable, str(folder / "driver.py"), str(target)]
    process = subprocess.Popen(
        [*command, "ray"],
        cwd=ROOT,
        env=marked,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    wait_until(lambda: len(list(target.glob("shards/*.parquet"))) >= 3, deadline)
    if how == "kill":
        process.kill()
    else:
        # As a terminal does: the whole process group, Ray's servers included.
        os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) != 0
    wait_until(lambda: not alive(target), time.monotonic() + 60)
    assert alive(target) == [], "Ray outlived its driver"
    assert not (target / "out.parquet").exists()

    before = len(list(target.glob("shards/*.parquet")))
    assert 3 <= before < 16
    called = len(lines(target / "calls.txt"))
    subprocess.run([*command, "local"], cwd=ROOT, env=marked, check=True, timeout=120)
    assert len(lines(target / "calls.txt")) - called == 64 - 4 * before
    rows = pq.read_table(target / "out.parquet").to_pylist()
    assert [row["value"] for row in rows] == [n * n for n in range(64)]


def wait_until(happened: Callable[[], bool], deadline: float) -> None:
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.05)
