"""Pictures of both UIs of a served project, and of its history, as in docs/images.

    python benchmarks/service_screenshots.py PROJECT --output docs/images
    python benchmarks/service_screenshots.py PROJECT --only history

PROJECT is a clone in which `ultraflux up --served` and a run with `--engine prefect` have been.
The page of `ultraflux history` needs no server.
Needs Debian's package `chromium` and the extra `dev`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import subprocess
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import Any

from browser import Tab, open_browser
from PIL import Image

from flows.records.records import read_json
from flows.tracking.tier import Secrets, ServedTier, served_tier, services_dir

PAGES = ("history", "prefect-run", "prefect-contracts", "mlflow-runs", "mlflow-stage")
WIDTH, HEIGHT, MARGIN = 1360, 850, 32
SETTLE_S = 6.0
"""For charts and animations, after the text that shows that the data are there."""
COLOURS = 128


def _authorization(known: Secrets) -> str:
    return "Basic " + base64.b64encode(f"admin:{known.mlflow_admin}".encode()).decode()


def _post(address: str, body: dict[str, Any], headers: dict[str, str]) -> Any:
    request = urllib.request.Request(
        address,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", **headers},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def pages(tier: ServedTier, known: Secrets) -> dict[str, tuple[str, str]]:
    """Address by picture and a text of the page: the first pipeline run in both UIs."""
    prefect = f"http://{tier.client_host}:{tier.prefect_port}"
    mlflow = f"http://{tier.client_host}:{tier.mlflow_port}"
    login = {"Authorization": _authorization(known)}
    flow = _post(
        f"{prefect}/api/flow_runs/filter", {"limit": 1, "sort": "EXPECTED_START_TIME_ASC"}, {}
    )
    contracts = _post(
        f"{prefect}/api/artifacts/filter", {"artifacts": {"key": {"any_": ["data-contracts"]}}}, {}
    )
    runs = _post(
        f"{mlflow}/api/2.0/mlflow/runs/search",
        {"experiment_ids": ["1"], "filter": "attributes.run_name = 'vae'", "max_results": 1},
        login,
    )
    if not flow or not contracts or not runs.get("runs"):
        raise SystemExit("error: no finished run on these servers: ultraflux run --engine prefect")
    run = runs["runs"][0]["info"]["run_id"]
    experiment = f"{mlflow}/#/experiments/1/runs"
    kind = "workflowType=machine_learning"
    return {
        "prefect-run": (f"{prefect}/runs/flow-run/{flow[0]['id']}", "Task runs"),
        "prefect-contracts": (f"{prefect}/artifacts/artifact/{contracts[0]['id']}", "verdict"),
        "mlflow-runs": (f"{experiment}?{kind}", "pipeline"),
        "mlflow-stage": (f"{experiment}/{run}/model-metrics?{kind}", "Model metrics"),
    }


async def screenshot(tab: Tab) -> Image.Image:
    """What the window shows now."""
    shot = await tab.call("Page.captureScreenshot", format="png")
    return Image.open(io.BytesIO(base64.b64decode(shot["data"])))


async def picture(tab: Tab, address: str, text: str) -> Image.Image:
    """What a page looks like once it shows `text` and has settled."""
    await tab.call("Page.navigate", url=address)
    await tab.wait_for(f"document.body && document.body.innerText.includes({json.dumps(text)})")
    # MLflow opens a chat panel over the page, and shows pipeline runs without their stages; the
    # last row is the first run.
    await tab.evaluate("document.querySelector('button[aria-label=Close]')?.click()")
    await asyncio.sleep(SETTLE_S)
    await tab.evaluate("[...document.querySelectorAll('.ag-row button')].at(-1)?.click()")
    await asyncio.sleep(SETTLE_S)
    return await screenshot(tab)


async def history(project: Path) -> Image.Image:
    """The page of `ultraflux history --html`, as high as it is."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "history.html"
        command = ["ultraflux", "history", "--html", str(page)]
        subprocess.run(command, cwd=project, check=True)
        async with open_browser(WIDTH, HEIGHT) as tab:
            await tab.call("Page.navigate", url=page.as_uri())
            await tab.wait_for("document.body && document.body.innerText.includes('Runs of')")
            bottom = await tab.evaluate("document.body.getBoundingClientRect().bottom")
            await tab.resize(WIDTH, min(int(bottom) + MARGIN, HEIGHT))
            return await screenshot(tab)


async def of_servers(
    project: Path, names: Collection[str]
) -> AsyncIterator[tuple[str, Image.Image]]:
    """Pages of both UIs by name."""
    tier = served_tier(project)
    if tier is None:
        raise SystemExit(f"error: {project} is not served: ultraflux up --served")
    known = Secrets(**read_json(services_dir(project) / "secrets.json"))
    for name, (address, text) in pages(tier, known).items():
        if name not in names:
            continue
        async with open_browser(WIDTH, HEIGHT) as tab:
            if name.startswith("mlflow"):
                headers = {"Authorization": _authorization(known)}
                await tab.call("Network.setExtraHTTPHeaders", headers=headers)
            yield name, await picture(tab, address, text)


def write(image: Image.Image, target: Path) -> None:
    """Write a PNG of few colours."""
    image.convert("RGB").quantize(COLOURS).save(target, optimize=True)
    print(f"{target}  {target.stat().st_size / 1000:.0f} kB")


async def main() -> None:
    """Write one PNG a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("project", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    parser.add_argument("--only", nargs="+", choices=PAGES, default=PAGES)
    arguments = parser.parse_args()
    if "history" in arguments.only:
        write(await history(arguments.project), arguments.output / "history.png")
    if served := set(arguments.only) - {"history"}:
        async for name, image in of_servers(arguments.project, served):
            write(image, arguments.output / f"{name}.png")


if __name__ == "__main__":
    asyncio.run(main())
