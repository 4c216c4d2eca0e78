"""A fit reported to Weights & Biases while it goes on, where a user wants that; what goes wrong there is never the fit's.

A process of its own speaks to the service (`engine.reporting_service`). Where it fails, whatever the reason, a second one
writes everything from the beginning into files, which `wandb sync` sends later. The files of a run are complete in themselves
also after an interruption: what was recorded before is read from metrics.jsonl.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shlex
import string
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finetune_dataflow.engine import files
from finetune_dataflow.engine.colors import plain_text
from finetune_dataflow.engine.event_log import listening
from finetune_dataflow.engine.line_process import LineProcess
from finetune_dataflow.engine.reported import concluded, logged, shared_config, summarised
from finetune_dataflow.engine.reporting_settings import ReportingSettings, reporting_settings
from finetune_dataflow.engine.run_directory import HISTORY
from finetune_dataflow.errors import UserError

RUN_ID, FILES, LOG = "wandb-run-id", "wandb", "reporting.log"
COMMAND = (sys.executable, "-P", str(Path(__file__).with_name("reporting_service.py")))
FINISHED, FAILED, INTERRUPTED = 0, 1, 255  # the exit codes of Weights & Biases
OPENING_SECONDS, SENDING_SECONDS = 10.0, 5.0  # until the service is taken to be out of reach; the fit waits at its end alone
STARTING_SECONDS = 20.0
ENDING_SECONDS = 5.0
MOST_OF_A_REASON = 300  # characters
LONGEST_TAG = 64  # as Weights & Biases has it
# What the process is not to inherit: the service of another run, and what would send files or steps elsewhere.
NOT_INHERITED = ("WANDB_SERVICE", "WANDB_DIR", "WANDB_RESUME")
QUIET = {
    "WANDB_DISABLE_CODE": "true", "WANDB_DISABLE_GIT": "true", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true",
}  # fmt: skip

__all__ = [
    "RUN_ID", "Reporter", "ReportingSettings", "reported_fit", "reported_metrics", "reporting", "reporting_settings", "run_id"
]  # fmt: skip
logger = logging.getLogger(__name__)


@contextmanager
def reporting(
    settings: ReportingSettings,
    run_directory: Path,
    config: Mapping[str, Any],
    name: str,
    *,
    group: str = "",
    tags: Sequence[str] = (),
    job_type: str = "train",
) -> Iterator[Reporter]:
    """Report a run while the block lasts: give the reporter every event of metrics.jsonl, and figures for the summary.

    config: the run's settings, told as `engine.reported.shared_config` makes them. name: what the run is called where neither
    the settings nor WANDB_NAME say it. The same directory is the same run of the service, whose id stands in wandb-run-id
    there. The run is finished where the block ends, failed where it raises, interrupted on Ctrl-C.
    """
    if not settings.services or os.environ.get("WANDB_MODE") == "disabled":
        yield Reporter(run_directory, None)
        return
    asked = {
        "project": settings.project,
        "run_name": settings.run_name or os.environ.get("WANDB_NAME") or name,
        "run_group": group,
        "run_tags": [each[:LONGEST_TAG] for each in tags if each],
        "run_job_type": job_type,
    }
    opening = {"settings": {each: value for each, value in asked.items() if value}, "config": shared_config(config)}
    reporter = Reporter(run_directory, opening, alone=not group)
    exit_code = FAILED
    try:
        yield reporter
        exit_code = FINISHED
    except KeyboardInterrupt:
        exit_code = INTERRUPTED
        raise
    finally:
        reporter.close(exit_code)


@contextmanager
def reported_fit(settings: ReportingSettings, run_directory: Path, values: Mapping[str, Any]) -> Iterator[None]:
    """Report a fit with these settings while the block lasts, under the name of its directory: every event that it records."""
    with reporting(settings, run_directory, values, run_directory.resolve().name) as reporter, listening(reporter):
        yield


def reported_metrics(
    settings: ReportingSettings, run_directory: Path, values: Mapping[str, Any], metrics: Mapping[str, Any]
) -> Path | None:
    """Report the metrics of the run in a directory, after its fit: the file with the run's id; None where nothing is reported."""
    with reporting(settings, run_directory, values, run_directory.resolve().name) as reporter:
        reporter.summary(metrics)
    file = run_directory / RUN_ID
    return file if settings.services and file.is_file() else None


class Reporter:
    """Takes a run's events and figures, and sees that they arrive. It never raises, and waits for nobody before `close`."""

    def __init__(self, run_directory: Path, opening: dict[str, Any] | None, *, alone: bool = True) -> None:
        """Begin to report; without an opening nothing is. alone: this process has no other run (as a sweep has)."""
        self._directory, self._opening = run_directory.resolve(), opening or {}
        self._told: list[dict[str, Any]] = []
        self._process: LineProcess | None = None
        self._began = self._offline = self._taken = self._warned = False
        self._ready: dict[str, Any] = {}
        self._reason = ""
        if opening is None:
            return
        try:
            self._opening["settings"] |= {"run_id": run_id(run_directory, alone=alone), **_where(run_directory)}
        except (UserError, OSError) as error:
            self._give_up(str(error))
        else:
            self._start()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Report an event of metrics.jsonl; those before one that says "resume" are read there."""
        if self._process is None:
            return
        if event.get("event") == "resume":
            self._catch_up()
        self._began = True
        self._take(event)
        self._listen()

    def summary(self, metrics: Mapping[str, Any]) -> None:
        """Put figures into the run's summary, as `engine.reported.summarised` names them.

        Before the first event, those in metrics.jsonl are reported: the fit may have been another process's.
        """
        if self._process is None:
            return
        self._catch_up()
        self._tell({"summary": summarised(metrics)})
        self._listen()

    def close(self, exit_code: int) -> None:
        """Say how the run ended, and wait, some seconds at most, until everything has arrived or stands in files."""
        if self._process is None:
            return
        self._tell({"end": exit_code})
        before = None
        while self._process is not None and self._process is not before:  # another one where this one fails
            before = self._process
            self._wait()
        if self._process is not None:
            self._process.leave(ENDING_SECONDS if self._process.ended else 0)
            self._process = None

    def _wait(self) -> None:
        """Wait for the process to end, at most for as long as it may take."""
        process, until = self._process, time.monotonic() + STARTING_SECONDS + OPENING_SECONDS + SENDING_SECONDS
        while process is not None and process is self._process and not process.ended:
            left = until - time.monotonic()
            if left <= 0:
                self._warn(f"Weights & Biases is busy still and goes on by itself. What it says will be in {self._log}.")
                return
            self._listen(left)

    def _take(self, event: Mapping[str, Any]) -> None:
        found = logged(event)
        if found is not None:
            self._tell({"step": found[0], "log": found[1]})
        elif event.get("event") == "end":
            self._tell({"summary": concluded(event)})

    def _catch_up(self) -> None:
        """Report what was recorded before, where nothing was reported yet."""
        history = self._directory / HISTORY
        if self._began or not history.is_file():
            return
        self._began = True
        with suppress(OSError, UnicodeDecodeError):
            for event in files.read_json_lines(history):
                self._take(event)

    def _tell(self, value: dict[str, Any]) -> None:
        self._told.append(value)
        if self._process is not None:
            self._process.tell(value)

    def _start(self) -> None:
        """Start the process, and tell it everything from the beginning."""
        self._ready, self._reason = {}, self._reason if self._offline else ""
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            self._process = LineProcess(COMMAND, _environment(self._log.parent), self._log)
        except OSError as error:
            self._give_up(f"{error.strerror or error}")
            return
        for each in (self._opening | {"offline": self._offline}, *self._told):
            self._process.tell(each)

    def _listen(self, seconds: float = 0.0) -> None:
        """Hear what the process says; where it has failed, go on with one that writes files."""
        process = self._process
        if process is None:
            return
        for said in process.heard(seconds):
            self._hear(said)
        if not process.ended or self._taken:
            return
        process.leave(0)
        reason = self._reason or f"the process that speaks to it ended ({_last_line(self._log)})"
        if self._offline:
            self._give_up(reason)
        else:
            self._offline, self._reason = True, reason
            self._start()

    def _hear(self, said: Mapping[str, Any]) -> None:
        if "ready" in said:
            self._ready = dict(said["ready"])
            if self._offline:
                deleted = f" For a new run there, delete {self._directory / RUN_ID}." if "deleted" in self._reason else ""
                self._warn(
                    f"Weights & Biases cannot be used: {_short(self._reason)}{deleted} The run is recorded in files instead. "
                    f"To send them: {self._command()}"
                )
            elif self._ready["url"]:
                logger.info("Weights & Biases: %s", self._ready["url"])
        elif "failed" in said:
            self._reason = self._reason or str(said["failed"])
        elif "noted" in said:
            self._warn(f"Weights & Biases: {_short(str(said['noted']))} To send everything later: {self._command()}")
        elif "finished" in said:
            self._taken = True
            if not said["finished"]:
                self._warn(f"Weights & Biases has not taken everything in time. To send the rest: {self._command()}")
            elif self._ready and not self._ready["url"] and not self._offline:
                logger.info("Recorded for Weights & Biases in files. To send them: %s", self._command())

    def _command(self) -> str:
        """What sends the files of this run."""
        if not self._ready:
            return f"wandb sync {shlex.quote(str(self._directory / FILES))}"
        option = "" if self._ready["offline"] else "--include-online "
        return f"wandb sync {option}{shlex.quote(self._ready['directory'])}"

    def _give_up(self, reason: str) -> None:
        self._process = None
        self._warn(
            f"Weights & Biases cannot be used: {_short(reason)} No figure is lost: all are in {self._directory / HISTORY}."
            f"{f' {self._log} says more.' if self._log.is_file() else ''}"
        )

    def _warn(self, text: str) -> None:
        """Say it, where nothing was said yet: one trouble makes many."""
        logger.log(logging.DEBUG if self._warned else logging.WARNING, "%s", plain_text(text))
        self._warned = True

    @property
    def _log(self) -> Path:
        return self._directory / FILES / LOG


def run_id(run_directory: Path, *, alone: bool = True) -> str:
    """The id of the run in a directory, from the file wandb-run-id there, which is written where there is none.

    Under an agent of Weights & Biases it is the one that the agent gives; the first of a process may take it from WANDB_RUN_ID.
    Raises UserError where the file cannot be written.
    """
    file, given = run_directory / RUN_ID, os.environ.get("WANDB_RUN_ID", "") if alone else ""
    there = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
    if given and os.environ.get("WANDB_SWEEP_ID"):
        found = given
    elif re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", there):
        found = there
    else:
        found = given or "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
    if found != there:
        files.write_text(file, f"{found}\n")
    return found


def _where(run_directory: Path) -> dict[str, Any]:
    """Where the files go, and how long the service may take, unless the user says so."""
    return {
        "root_dir": str(run_directory.resolve()),
        **({} if "WANDB_INIT_TIMEOUT" in os.environ else {"init_timeout": OPENING_SECONDS}),
        **({} if "WANDB_FINISH_TIMEOUT" in os.environ else {"finish_timeout": SENDING_SECONDS}),
    }


def _environment(place: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    return {**kept, **QUIET, "WANDB_CACHE_DIR": str(place / "cache")}


def _last_line(log: Path) -> str:
    """What the process wrote last, for one that ended without a word."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        lines = []
    return next((each.strip() for each in reversed(lines) if each.strip()), "without a word")


def _short(reason: str) -> str:
    """A reason as a sentence in one line."""
    text = " ".join(reason.split())[:MOST_OF_A_REASON]
    return text if text.endswith((".", "!", "?", "…")) else f"{text}."
