"""The pictures docs/ui.png and docs/ui-failed.png, made anew: `python docs/ui_screenshot.py`.

A finished run and one that fails are tracked by the real server of the Hamilton UI, on rows of the example and the tests' tiny
model, and their graphs are shown in Chromium. A Chromium of the system, the packages playwright and those of
`finetune-dataflow[ui]` are needed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hamilton import driver
from playwright.sync_api import sync_playwright

import finetune_dataflow
from finetune_dataflow.errors import UserError
from finetune_dataflow.tracking import hamilton_tracker, nodes_left
from finetune_dataflow.tracking.run import RunTracker

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
ROWS = 80
FIT = {"epochs": 1.0, "num_layers": 2, "max_tokens": 12, "max_seq_length": 256}
CENTRE, NODE_HEIGHT = re.compile(r"^\s*finished_fit\s*$"), 14  # pixels
OUTPUTS = ["save_best_models", "hold_out_set_predictions", "verdict"]


@contextmanager
def server(directory: Path) -> Iterator[str]:
    """The address of a server that ends with the block."""
    command = [sys.executable, "run.py", "ui", "--port", "0", "--directory", str(directory)]
    with subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        try:
            if found is None:
                sys.exit("The Hamilton UI did not start.")
            yield found[0]
        finally:
            process.terminate()


def tracked_run(url: str, name: str, inputs: dict[str, Any]) -> str:
    """The address of a run's page, once the run is done or has failed."""
    tracker = hamilton_tracker(name, {"data": Path(inputs["data_path"]).name}, url, outputs=OUTPUTS)
    assert isinstance(tracker, RunTracker)
    dr = driver.Builder().with_config({"start": "base"}).with_modules(finetune_dataflow).with_adapters(tracker).build()
    try:
        dr.execute(nodes_left(dr, tracker), inputs=inputs)
    except UserError as error:
        print(f"As it should be: {error}")
    tracker.finish()
    return tracker.address


def taken(browser: Any, address: str, out: Path) -> None:
    """A picture of a run's page, with more room for its graph than there is on most screens."""
    page = browser.new_page(viewport={"width": 1500, "height": 1200})
    page.goto(address)
    page.get_by_text("DAG View", exact=True).filter(visible=True).click()
    page.locator(".react-flow__node").first.wait_for(state="visible")
    page.evaluate("document.querySelectorAll('[class*=\"h-[500px]\"]').forEach(each => each.style.height = '830px')")
    page.locator(".react-flow__controls-fitview").click()
    page.wait_for_timeout(1000)
    node, plot = page.locator(".react-flow__node").filter(has_text=CENTRE), page.locator(".react-flow").bounding_box()
    for _ in range(40):  # the wheel enlarges the graph around the pointer
        box = node.bounding_box()
        if box["height"] >= NODE_HEIGHT:
            break
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.wheel(0, -40)
        page.wait_for_timeout(50)
    corner = plot["x"] + 20, plot["y"] + 20
    page.mouse.move(*corner)
    page.mouse.down()
    page.mouse.move(corner[0] + plot["x"] + 0.4 * plot["width"] - box["x"], corner[1] + plot["y"] + plot["height"] / 2 - box["y"])
    page.mouse.up()
    page.mouse.move(5, 5)
    page.wait_for_timeout(500)
    page.screenshot(path=str(out))
    page.close()
    print(f"Wrote {out}.")


def main() -> None:
    """Track the runs, and take the pictures."""
    from tests.tiny_model import write_tiny_model

    logging.getLogger("hamilton").setLevel(logging.CRITICAL + 1)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("No chromium, chromium-browser or google-chrome was found.")
    with tempfile.TemporaryDirectory() as name, server(Path(name) / "ui") as url, sync_playwright() as player:
        directory = Path(name)
        rows = json.loads((HERE.parent / "example-support-dataset.json").read_text(encoding="utf-8"))[:ROWS]
        (directory / "support.json").write_text(json.dumps(rows))
        keys = {"input_text_key": "question", "output_text_key": "reply", "data_path": str(directory / "support.json")}
        given = {**keys, **FIT, "model_id": str(write_tiny_model(directory / "tiny"))}
        whole = tracked_run(url, "support", {**given, "output_dir": str(directory / "run")})
        wrong = {"learning_rate": 1e30, "optimizer": "sgd", "output_dir": str(directory / "failed")}
        failed = tracked_run(url, "support, rate too high", {**given, **wrong})
        browser = player.chromium.launch(executable_path=chromium, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        taken(browser, whole, HERE / "ui.png")
        taken(browser, failed, HERE / "ui-failed.png")
        browser.close()


if __name__ == "__main__":
    main()
