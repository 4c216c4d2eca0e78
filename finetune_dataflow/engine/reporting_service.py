"""The process that speaks to Weights & Biases: JSON lines in for what is to be logged, JSON lines out for what is to be said.

It is run by its path, and imports nothing of this package: it needs neither MLX nor the graph. Nothing that the library does
(wait, ask, die, exit, change the environment) happens in the process of the fit. It is told

- first {"settings": fields of wandb.Settings, "config": ..., "offline": whether the network is out of the question},
- then {"step": n, "log": {...}} and {"summary": {...}} as often as needed,
- last {"end": exit code}. Where that is missing, whoever told is gone, and the run has failed.

It tells {"ready": {...}} or {"failed": reason}, {"noted": text} of what the library warns of, and at last {"finished": whether
everything was taken}.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import traceback
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

FAILED = 1
CONNECTING_SECONDS = 5.0
OFFLINE = ("offline", "dryrun")
MOST_OF_A_TEXT = 1000  # characters
STYLE, ORIGIN = re.compile(r"\x1b\[[0-9;]*m"), re.compile("^(wandb: )?(WARNING |ERROR )?", re.MULTILINE)
# Numbers and settings alone: no code, no git, no console, nothing of this machine, no name of it.
QUIET: dict[str, Any] = {
    "allow_val_change": True, "console": "off", "disable_code": True, "disable_git": True, "finish_timeout_raises": True,
    "host": "", "label_disable": True, "program": "finetune-dataflow", "save_code": False, "silent": True,
    "use_dot_wandb": False, "x_disable_machine_info": True, "x_disable_meta": True, "x_disable_stats": True,
    "x_save_requirements": False,
}  # fmt: skip

Tell = Callable[..., None]


def main() -> None:
    """Log what stdin says, until it says how it ended."""
    told, tell = streams()
    opening = json.loads(told.readline() or "null")
    if opening is None:
        return
    import wandb
    from wandb.errors import term

    shared = wandb.setup().settings
    term.termsetup(shared, Notes(tell))
    if shared.mode == "disabled":
        tell(finished=True)
        return
    offline = opening["offline"] or shared.mode in OFFLINE
    # A run that is resumed offline would be put behind what the server has of it, when it is sent. Without resume it takes
    # its place, which is right, because it is told from its beginning.
    how: dict[str, Any] = {"mode": "offline"} if offline else {"mode": "online", "resume": "allow"}
    settings = wandb.Settings(**QUIET, **opening["settings"], **how, stop_fn=interrupting(os.getppid()))
    try:
        if not offline:
            check_reachable(shared.base_url, proxied=bool(shared.http_proxy or shared.https_proxy))
        run = wandb.init(settings=settings, config=opening["config"])
    except (wandb.Error, OSError) as error:
        tell(failed=plain(str(error)).partition("Consider increasing")[0])
        raise
    place = os.path.dirname(run.dir)
    tell(ready={"offline": run.offline, "directory": place, "url": None if run.offline else run.url})
    exit_code = logged(run, told)
    try:
        run.finish(exit_code=exit_code)
    except TimeoutError:
        tell(finished=False)
    else:
        tell(finished=True)


def check_reachable(url: str, *, proxied: bool) -> None:
    """Raise OSError where nobody answers at the address of the service; the library would try again and again.

    Where a proxy stands between, it is left to the library to find out.
    """
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    if proxied or (urllib.request.getproxies() and not urllib.request.proxy_bypass(host)):
        return
    try:
        socket.create_connection((host, parts.port or (443 if parts.scheme == "https" else 80)), CONNECTING_SECONDS).close()
    except OSError as error:
        raise OSError(f"{host} cannot be reached: {error.strerror or error}") from error


def logged(run: Any, told: IO[str]) -> int:
    """Log every line, but for steps that the server has from before; the exit code at the end."""
    step = None
    for line in told:
        if not line.endswith("\n"):  # whoever wrote it was killed at it
            break
        value = json.loads(line)
        if "end" in value:
            return int(value["end"])
        if "summary" in value:
            if step is not None:  # a row that is open would be summarised when it is closed, over these figures
                run.log({}, step=step, commit=True)
                step = None
            run.summary.update(value["summary"])
        elif value["step"] >= run.starting_step:
            step = value["step"]
            run.log(value["log"], step=step)
    return FAILED


class Notes:
    """What the library would print: it goes to the log, and what it warns of is told. Its errors are raised, too."""

    def __init__(self, tell: Tell) -> None:
        """Pass on what is to be told with `tell`."""
        self._tell = tell

    def info(self, text: str) -> None:
        """Log it."""
        print(plain(text), file=sys.stderr, flush=True)

    error = info

    def warning(self, text: str) -> None:
        """Log it and tell it."""
        self.info(text)
        self._tell(noted=plain(text))


def plain(text: str) -> str:
    """A text without colours and without where it comes from, cut at 1,000 characters."""
    return ORIGIN.sub("", STYLE.sub("", text))[:MOST_OF_A_TEXT]


def interrupting(process: int) -> Callable[[], None]:
    """What the button "stop run" does: interrupt the fit as Ctrl-C does, while it is there."""

    def stop() -> None:
        if os.getppid() == process:
            os.kill(process, signal.SIGINT)

    return stop


def streams() -> tuple[IO[str], Tell]:
    """stdin and stdout for us alone; the processes that the library starts inherit what stands in their place."""
    told, ours = os.fdopen(os.dup(0), encoding="utf-8"), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)

    def tell(**values: object) -> None:
        with suppress(BrokenPipeError):
            os.write(ours, json.dumps(values).encode() + b"\n")

    return told, tell


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(FAILED)  # what the library does at an ordinary exit may wait for the network
