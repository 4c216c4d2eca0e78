"""The pictures of docs/, made anew: `python docs/screenshots.py RUN` (a finished run of the example), or `make screenshots`.

report.png and report-phone.png show RUN/report.html in Chromium; prompt.png shows what `run.py prompt --colorize` writes to a
terminal. A Chromium of the system and the package playwright are needed.
"""

from __future__ import annotations

import html
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
COLUMNS = 100
PROMPT = "How do I change the address of my order?"


def terminal_output(arguments: list[str]) -> str:
    """What `run.py` writes to a terminal of `COLUMNS` columns."""
    main, side = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    process = subprocess.Popen(
        [sys.executable, "run.py", *arguments], cwd=HERE.parent, stdin=side, stdout=side, stderr=side, env=environment
    )
    os.close(side)
    written = bytearray()
    while True:
        try:
            written += os.read(main, 65536)
        except OSError:  # the other end is closed
            break
    process.wait()
    return written.decode("utf-8").replace("\r\n", "\n")


def color(code: int) -> str:
    """A colour of the fixed part of the 256-colour palette in CSS."""
    if code >= 232:
        return f"rgb({', '.join(3 * [str(8 + 10 * (code - 232))])})"
    levels = (0, 95, 135, 175, 215, 255)
    red, rest = divmod(code - 16, 36)
    return f"rgb({levels[red]}, {levels[rest // 6]}, {levels[rest % 6]})"


def spans(text: str) -> Iterator[str]:
    """Terminal text as HTML: colours as we write them, the rest of what a terminal obeys left out."""
    style = ""
    for part in re.split(r"(\x1b\[[0-9;]*[A-Za-z])", text.replace("\r", "\n")):
        found = re.fullmatch(r"\x1b\[([0-9;]*)m", part)
        if found is None:
            yield f'<span style="{style}">{html.escape(part)}</span>' if not part.startswith("\x1b") else ""
            continue
        codes = re.fullmatch(r"38;5;(\d+);48;5;(\d+)", found[1])
        style = f"color: {color(int(codes[1]))}; background: {color(int(codes[2]))}" if codes else ""


def terminal_page(command: str, shown: str) -> str:
    """A page that looks like a terminal."""
    return (
        '<!doctype html><meta charset="utf-8"><style>body { margin: 0; background: #16181d; } pre { margin: 0; padding: 18px; '
        f"color: #d9dce1; font: 15px/1.5 monospace; white-space: pre-wrap; width: {COLUMNS}ch; }}</style>"
        f"<pre><b>$ {html.escape(command)}</b>\n{''.join(spans(shown))}</pre>"
    )


def taken(browser: Any, page: Path, out: Path, width: int, height: int, scheme: str, part: str | None = None) -> None:
    """A picture of a page, or of a part of it."""
    opened = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    opened.goto(page.as_uri())
    opened.wait_for_timeout(1500)
    (opened.locator(part) if part else opened).screenshot(path=str(out))
    opened.close()
    print(f"Wrote {out}.")


def main() -> None:
    """Take the pictures."""
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "report.html").is_file():
        sys.exit("Expected: python docs/screenshots.py RUN, a finished run with its report.html.")
    run = Path(sys.argv[1]).resolve()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("No chromium, chromium-browser or google-chrome was found.")
    arguments = ["prompt", "--run", str(run), "-p", PROMPT, "--colorize"]
    shown = terminal_output(arguments)
    command = f'python run.py prompt --run runs/<run> -p "{PROMPT}" --colorize'
    with sync_playwright() as driver, tempfile.TemporaryDirectory() as directory:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        taken(browser, run / "report.html", HERE / "report.png", 1200, 1500, "light")
        taken(browser, run / "report.html", HERE / "report-phone.png", 390, 844, "dark")
        page = Path(directory) / "terminal.html"
        page.write_text(terminal_page(command, shown), encoding="utf-8")
        taken(browser, page, HERE / "prompt.png", 1000, 400, "dark", "pre")
        browser.close()


if __name__ == "__main__":
    main()
