"""Whose turn it is at a study, and whose trial is whose: between processes of one machine, or between machines.

On one machine the kernel knows: a turn and a trial are locks on files, which end with the process that holds them.

Between machines nothing is common but the study's storage. A turn there is a ticket, a trial of a second study, whose
numbers the storage gives out one by one: it lasts until the ticket is told. A trial is claimed in an attribute that is
written within a turn only, and its agent's heart beats in another attribute. Clocks are never compared: a claim is
lost when its beat has stood still for LEASE_SECONDS on the clock of who looks, or at once when it was made on this very
machine by a process that is gone.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finetune_dataflow.engine import files
from finetune_dataflow.sweeps.storage import storage_errors

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

CLAIM, BEAT, SESSION = "claim", "beat", "session"  # attributes; the last two with a colon and whose they are
BEAT_SECONDS = 2.0
LEASE_SECONDS = 60.0  # of silence, after which an agent is taken for dead
TURN_SECONDS = 60.0  # after which a ticket that is not told is passed over
ASKING_SECONDS = 0.1

logger = logging.getLogger(__name__)


class ClaimLost(Exception):
    """A trial that this agent had, and that another one has taken because it was silent for too long."""


class StopAsked(KeyboardInterrupt):
    """The sweep that told this agent what to do has ended, or is gone."""


class Desk(Protocol):
    """Where agents take turns, and claim trials."""

    def turn(self) -> Any:
        """A context in which no other agent asks for a trial."""

    def free(self, trial: FrozenTrial) -> bool:
        """Whether a trial that is said to run is nobody's any more. Called within a turn."""

    def take(self, trial: optuna.Trial) -> None:
        """Write down that a trial is this agent's. Called within a turn."""

    def holding(self, trial: optuna.Trial) -> Any:
        """A context in which the trial is kept. Raises ClaimLost or StopAsked."""


@dataclass(frozen=True)
class FileDesk:
    """Turns by a lock in the sweep's directory, for agents of one machine; a trial is held by its directory's own lock."""

    directory: Path

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no other process asks or tells. The kernel ends the turn of a process that ends."""
        with files.writing(self.directory / ".turn"):
            handle = (self.directory / ".turn").open("w")
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def free(self, trial: FrozenTrial) -> bool:
        """Always: the lock of the trial's directory says it."""
        return True

    def take(self, trial: optuna.Trial) -> None:
        """Nothing: the lock of the trial's directory says it."""

    @contextmanager
    def holding(self, trial: optuna.Trial) -> Iterator[None]:
        """Nothing is to be kept."""
        yield


@dataclass
class SharedDesk:
    """Turns, claims and heartbeats in the study's storage. session: the call of the sweep, watched where it is elsewhere."""

    study: optuna.Study
    session: str = ""
    watched: bool = False
    agent: str = field(default_factory=lambda: uuid.uuid4().hex)
    _seen: dict[Any, tuple[Any, float]] = field(default_factory=dict)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until all earlier tickets are told, or the first of them is overdue."""
        import optuna
        from optuna.trial import TrialState

        tickets = optuna.create_study(
            storage=self.study._storage, study_name=f"{self.study.study_name}-turns", load_if_exists=True
        )
        ticket = tickets.ask()
        try:
            while earlier := [
                each.number
                for each in tickets.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
                if each.number < ticket.number
            ]:
                if self._stood_still(("ticket", min(earlier)), True, TURN_SECONDS):
                    tickets.tell(min(earlier), state=TrialState.FAIL, skip_if_finished=True)
                    continue
                time.sleep(ASKING_SECONDS)
            yield
        finally:
            tickets.tell(ticket, 0.0, skip_if_finished=True)

    def free(self, trial: FrozenTrial) -> bool:
        """Whether its claim was given back, its process is gone, or its heart has not beaten for LEASE_SECONDS."""
        claim = trial.user_attrs.get(CLAIM) or {}
        if not claim or (claim["machine"] == machine() and not _alive(claim["pid"], claim["started"])):
            return True
        beat = trial.user_attrs.get(f"{BEAT}:{claim['agent']}", 0)
        return claim["agent"] != self.agent and self._stood_still(trial.number, (claim["agent"], beat), LEASE_SECONDS)

    def take(self, trial: optuna.Trial) -> None:
        """Write the claim: agent, host, machine and process."""
        pid = os.getpid()
        trial.set_user_attr(
            CLAIM,
            {"agent": self.agent, "host": socket.gethostname(), "machine": machine(), "pid": pid, "started": _started(pid)},
        )

    @contextmanager
    def holding(self, trial: optuna.Trial) -> Iterator[None]:
        """Let the heart beat for the block, and give the claim back after it. Raises ClaimLost or StopAsked."""
        guard = _Guard(self, trial.number)
        guard.start()
        try:
            yield
        except KeyboardInterrupt as interrupt:
            if guard.problem is None:
                raise
            raise guard.problem from interrupt
        finally:
            guard.ended.set()
            guard.join()
            if not isinstance(guard.problem, ClaimLost):
                self._give_back(trial)

    def _give_back(self, trial: optuna.Trial) -> None:
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            trial.set_user_attr(CLAIM, {})
        except UpdateFinishedTrialError:
            return  # it was told: nobody will ask whose it is
        except storage_errors() as error:
            logger.warning("The claim on trial %d could not be given back (%s).", trial.number, type(error).__name__)

    def _stood_still(self, what: Any, value: Any, seconds: float) -> bool:
        """Whether a value has been the same for so long, since it was first looked at here."""
        if what not in self._seen or self._seen[what][0] != value:
            self._seen[what] = value, time.monotonic()
        return time.monotonic() - self._seen[what][1] > seconds


class _Guard(threading.Thread):
    """Beats for a trial; interrupts the main thread where the trial is lost, or the sweep was stopped or is gone."""

    def __init__(self, desk: SharedDesk, number: int) -> None:
        super().__init__(daemon=True)
        self.desk, self.number = desk, number
        self.ended = threading.Event()
        self.problem: ClaimLost | StopAsked | None = None

    def run(self) -> None:
        beat, last = 0, time.monotonic()
        while not self.ended.wait(BEAT_SECONDS if beat else 0):
            beat += 1
            try:
                self._beat(beat)
                last = time.monotonic()
            except storage_errors() as error:
                silent = time.monotonic() - last
                logger.warning("The study cannot be reached (%s), for %.0f s now.", type(error).__name__, silent)
                if silent > LEASE_SECONDS:
                    self.problem = ClaimLost(f"Trial {self.number}: the study could not be reached for {silent:.0f} s.")
            if self.problem is not None and not self.ended.is_set():
                os.kill(os.getpid(), signal.SIGINT)
                return

    def _beat(self, beat: int) -> None:
        from optuna.exceptions import UpdateFinishedTrialError

        study, desk = self.desk.study, self.desk
        frozen = study.get_trials(deepcopy=False)[self.number]
        if frozen.state.is_finished():
            return
        claim = frozen.user_attrs.get(CLAIM) or {}
        if claim.get("agent") != desk.agent:
            self.problem = ClaimLost(f"Trial {self.number} was taken over by {claim.get('host', 'another agent')}.")
            return
        if desk.watched:
            said = study.user_attrs.get(f"{SESSION}:{desk.session}") or {}
            if said.get("stopped"):
                self.problem = StopAsked("The sweep was stopped.")
            elif desk._stood_still("session", said.get("beat"), LEASE_SECONDS):
                self.problem = StopAsked(f"The sweep that this agent works for has been silent for {LEASE_SECONDS:.0f} s.")
        try:
            study._storage.set_trial_user_attr(frozen._trial_id, f"{BEAT}:{desk.agent}", beat)
        except UpdateFinishedTrialError:
            return


@cache
def machine() -> str:
    """What tells this machine, since it was started, and this container from all others; process numbers mean nothing beyond."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not a Linux
        return f"{socket.gethostname()} {uuid.getnode():x}"


def _started(pid: int) -> str:
    """When a process was started, as the kernel counts it; empty where it does not say. One that has ended was never started."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "ended" if state[0] in "ZX" else state[19]
    except (OSError, IndexError):
        return ""


def _alive(pid: int, started: str) -> bool:
    """Whether a process of this machine still runs, and is the one that was started then."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return _started(pid) == started
