"""An agent in a process of its own, on whichever machine a cluster's task came to.

The task stays its parent: it holds the end of a pipe, and when that closes, because the task was cancelled, its worker
killed or the cluster shut down, the agent stops after the update it is at, and saves.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune_dataflow.errors import UserError
from finetune_dataflow.sweeps.agent import AgentJob, work

PARTING_SECONDS = 30.0  # for an agent to stop after its task has ended
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
MISTAKE, STOPPED = 2, 130  # exit codes, as the command line has them

logger = logging.getLogger(__name__)


def in_own_process(job: AgentJob) -> list[int]:
    """The numbers of the trials that an agent brought to an end in a new process, begun again where it is killed.

    Raises UserError where it ends by one, and RuntimeError with its traceback where it ends by another error.
    """
    while True:
        said, code = _one_process(job)
        if code == MISTAKE and "problem" in said:
            raise UserError(str(said["problem"]))
        if code in (0, STOPPED):
            return list(said.get("ended", []))
        if code >= 0:
            raise RuntimeError(f"An agent of the sweep ended with the exit code {code}.\n{said.get('fault', '')}")
        logger.warning("A process of a trial ended without a word (signal %d). Another one goes on.", -code)


def _one_process(job: AgentJob) -> tuple[dict[str, Any], int]:
    """What the process said of its end, and its exit code."""
    package = Path(__file__).parent.parent.parent
    paths = [str(package), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if job.threads is not None:
        environment.update({name: str(job.threads) for name in THREADS})
    # A session of its own: the terminal's Ctrl-C is for the sweep, which passes it on.
    command = [sys.executable, "-m", __name__]
    with (job.place / f"agents-{socket.gethostname()}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
            start_new_session=True,
        )
    try:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(asdict(job)) + "\n")
        process.stdin.flush()
        lines = process.stdout.read().splitlines()  # to the end of the process
        code = process.wait()
    finally:
        _parted(process)
    return json.loads(lines[-1]) if lines else {}, code


def _parted(process: subprocess.Popen[str]) -> None:
    """Let the process stop, and see to it."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    try:
        process.wait(PARTING_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> int:
    """Work as the job on the standard input says; the exit code. The last line of the standard output is what came of it."""
    # Workers of clusters ignore or block what a terminal sends them, and their children would with them.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed belongs to the log
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("finetune_dataflow").setLevel(logging.INFO)
    logging.getLogger("hamilton").setLevel(logging.CRITICAL + 1)
    sys.excepthook = lambda *error: print(
        json.dumps({"fault": "".join(traceback.format_exception(*error))}), file=out, flush=True
    )
    values = json.loads(sys.stdin.readline())
    job = AgentJob(**{**values, "arguments": tuple(values["arguments"])})
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    said: dict[str, Any] = {}
    code = 0
    try:
        said = {"ended": work(job)}
    except UserError as error:
        said, code = {"problem": str(error)}, MISTAKE
    except KeyboardInterrupt as stopped:
        logger.info("%s", stopped or "Stopped.")
        code = STOPPED
    try:
        print(json.dumps(said), file=out, flush=True)
    except BrokenPipeError:
        return STOPPED  # nobody is there any more
    return code


def _stop_with_parent() -> None:
    """Interrupt the main thread when the parent is gone, and end the process where that does not."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(PARTING_SECONDS)
    os._exit(STOPPED)


if __name__ == "__main__":
    sys.exit(main())
