"""A real run over hostile rows, its report opened in a real browser, its output shown on a real terminal."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_report import hostile_rows
from tests.tiny_model import write_tiny_model

REPOSITORY = Path(__file__).parent.parent
WIDTHS = {"desktop": 1280, "phone": 360}


def on_a_terminal(arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """The exit code of `run.py` and everything that it wrote to its terminal."""
    main, side = pty.openpty()
    command = [sys.executable, "run.py", *arguments]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdin=side, stdout=side, stderr=side, env=environment, close_fds=True)
    os.close(side)
    written = bytearray()
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(main)
    return process.wait(), written.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a run, and what its terminal showed."""
    directory = tmp_path_factory.mktemp("hostile")
    model = write_tiny_model(directory / "model")
    data = directory / "rows.json"
    data.write_text(json.dumps(hostile_rows()))
    arguments = ["--data", str(data), "--input-text-key", "question", "--output-text-key", "reply", "--model", str(model)]
    wanted = ["--max-tokens", "8", "--num-layers", "1", "--prompt", hostile_rows()[3]["question"], "--colorize", "true"]
    environment = {**os.environ, "TERM": "xterm-256color", "FINETUNE_DATAFLOW_CACHE": str(directory / "cache")}
    code, shown = on_a_terminal([*arguments, *wanted, "--out", str(directory / "run")], environment)
    assert code == 0, shown[-3000:]
    return directory / "run", shown


def test_what_the_terminal_is_told_is_colour_and_the_bar_and_nothing_of_the_data_s(run: tuple[Path, str]) -> None:
    obeyed = set(re.findall(r"\x1b(?:\[[0-9;?]*[A-Za-z]|.)", run[1]))
    assert obeyed and all(re.fullmatch(r"\x1b\[[0-9;]*m|\x1b\[[AKJ]|\x1b\[1?K", each) for each in obeyed), obeyed
    assert "\x1b[2J" not in run[1] and "\x1b]" not in run[1] and "\x07" not in run[1] and "\u202e" not in run[1]


@pytest.mark.parametrize("width", WIDTHS.values(), ids=list(WIDTHS))
def test_the_report_of_a_run_opens_without_network_error_or_a_script_of_the_data_s(
    run: tuple[Path, str], browser: Any, width: int
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    faults: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: faults.append(f"dialog {dialog.message}"))
    page.goto((run[0] / "report.html").as_uri())
    for _ in range(60):
        page.mouse.wheel(0, 700)
        page.wait_for_timeout(40)
    charts = page.locator(".js-plotly-plot")
    assert charts.count() == 9
    drawn = page.evaluate("[...document.querySelectorAll('.js-plotly-plot')].map(each => each.data.length)")
    assert all(count > 0 for count in drawn)
    assert faults == [] and [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.evaluate("window.__hacked") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert "<script>window.__hacked = 1</script>" in page.inner_text("body")
    page.close()
