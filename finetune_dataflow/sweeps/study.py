"""The study of a sweep: which trials there are, whose turn it is, what came of them.

Optuna keeps it in a database, by default an SQLite file in the sweep's directory. Agents, in one process or in many, take
turns at asking for a trial; whoever has a trial holds the lock of its directory. So a trial that the study believes to be
running, and whose directory nobody holds, was killed: it is done again, with its own parameters, in its own directory.
"""

from __future__ import annotations

import fcntl
import json
import math
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_dataflow.engine import files
from finetune_dataflow.engine.settings import differences
from finetune_dataflow.errors import UserError
from finetune_dataflow.sweeps import search
from finetune_dataflow.sweeps.results import TrialResult
from finetune_dataflow.sweeps.sweep_file import SweepFile

if TYPE_CHECKING:
    import optuna

STUDY, TRIALS, RESULT = "study.db", "trials", "trial.json"
PLAN, ATTEMPTS = "plan", "attempts"  # user attributes of the study and its trials
MOST_ATTEMPTS = 2  # of one call of the sweep, for a trial whose process ends without a word
WAIT_SECONDS = 120  # for a database that another process writes


@dataclass(frozen=True)
class Claim:
    """A trial that is this agent's: nobody else has it meanwhile. attempts: how often this call began it, with this time."""

    number: int
    parameters: dict[str, Any]
    directory: Path
    attempts: int
    trial: optuna.Trial


@dataclass(frozen=True)
class Study:
    """An opened study, its sweep, and where its files are. most: trials at most, None for as many as there are."""

    study: optuna.Study
    sweep: SweepFile
    directory: Path
    most: int | None

    def trial_directory(self, number: int) -> Path:
        """Where a trial's run is."""
        return self.directory / TRIALS / str(number)

    @contextmanager
    def claimed(self, session: str) -> Iterator[Claim | None]:
        """The next trial, held for the block: one that was killed, or a new one; None where there is none left."""
        with ExitStack() as held:
            with _turn(self.directory):
                claim = self._orphan(session, held) or self._new(session, held)
            yield claim

    def tell(self, claim: Claim, result: TrialResult) -> None:
        """Write down what came of a trial. The trial's own file comes first: a kill in between loses nothing."""
        from optuna.trial import TrialState

        files.write_json(claim.directory / RESULT, plain(result))
        states = {"complete": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}
        value = result.value if result.state == "complete" else None
        with _turn(self.directory):
            self.study.tell(claim.trial, value, states[result.state])

    def results(self) -> list[TrialResult]:
        """Every trial so far, in the order of its number."""
        found = []
        for each in self.study.get_trials(deepcopy=False):
            result = read_result(self.trial_directory(each.number))
            found.append(result or self._bare(each))
        return found

    def best(self) -> TrialResult | None:
        """The finished trial with the best value; of equal ones the first."""
        complete = [each for each in self.results() if each.state == "complete" and each.value is not None]
        sign = -1 if self.sweep.metric.goal == "maximize" else 1
        return min(complete, key=lambda each: sign * (each.value or 0.0), default=None)

    def curves(self) -> list[list[float]]:
        """What each trial's metric was at each of its validations, from the trials' own logs."""
        count = len(self.study.get_trials(deepcopy=False))
        return [metric_history(self.trial_directory(number), self.sweep.metric.name) for number in range(count)]

    def _bare(self, trial: optuna.trial.FrozenTrial) -> TrialResult:
        """What the study alone knows of a trial."""
        names = {"COMPLETE": "complete", "PRUNED": "stopped", "FAIL": "failed"}
        directory = self.trial_directory(trial.number)
        curve = metric_curve(directory, "validation_loss")
        parameters = dict(trial.user_attrs.get(search.PARAMETERS, {}))
        state, seconds = names.get(trial.state.name, "running"), trial.duration.total_seconds() if trial.duration else 0.0
        error = "its files are gone" if state == "failed" else None
        return TrialResult(trial.number, state, parameters, trial.value, {}, tuple(curve), seconds, error, str(directory))

    def _orphan(self, session: str, held: ExitStack) -> Claim | None:
        import optuna
        from optuna.trial import TrialState

        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            directory = files.make_output_directory(self.trial_directory(frozen.number))
            try:
                held.enter_context(files.locked(directory))
            except UserError:
                continue  # an agent is at work on it
            # The one way to a handle of a trial that another process asked for.
            return self._claim(optuna.Trial(self.study, frozen._trial_id), session, directory)
        return None

    def _new(self, session: str, held: ExitStack) -> Claim | None:
        if self._enough():
            return None
        trial = self.study.ask()
        directory = files.make_output_directory(self.trial_directory(trial.number))
        held.enter_context(files.locked(directory))
        return self._claim(trial, session, directory)

    def _claim(self, trial: optuna.Trial, session: str, directory: Path) -> Claim:
        parameters = trial.user_attrs.get(search.PARAMETERS)
        if parameters is None:
            parameters = search.suggest(trial, self.sweep)
            trial.set_user_attr(search.PARAMETERS, parameters)
        before = trial.user_attrs.get(ATTEMPTS, {}).get(session, 0)
        trial.set_user_attr(ATTEMPTS, {session: before + 1})
        return Claim(trial.number, dict(parameters), directory, before + 1, trial)

    def _enough(self) -> bool:
        """Whether no new trial is wanted: all combinations are tried, enough trials are made, or the target is reached."""
        bounds = [each for each in (self.most, search.combinations(self.sweep)) if each is not None]
        if bounds and len(self.study.get_trials(deepcopy=False)) >= min(bounds):
            return True
        target, best = self.sweep.metric.target, self.best()
        if target is None or best is None or best.value is None:
            return False
        return best.value >= target if self.sweep.metric.goal == "maximize" else best.value <= target


def opened(sweep: SweepFile, directory: Path, storage: str, plan: Mapping[str, Any], most: int | None, seed: int) -> Study:
    """The study in `directory`, made where there is none.

    storage: a URL as Optuna takes it; empty for an SQLite file in the directory. plan: what makes this sweep this one.
    Raises UserError where the study cannot be read, or is another sweep's, naming what differs.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    where = storage or str(directory / STUDY)
    try:
        with _turn(directory):
            study = optuna.create_study(
                storage=_storage(storage or f"sqlite:///{(directory / STUDY).resolve()}"),
                sampler=search.sampler(sweep, seed),
                study_name=f"finetune-dataflow-{files.fingerprint(dict(plan))[:16]}" if storage else "sweep",
                direction=optuna.study.StudyDirection.MAXIMIZE
                if sweep.metric.goal == "maximize"
                else optuna.study.StudyDirection.MINIMIZE,
                load_if_exists=True,
            )
            there = study.user_attrs.get(PLAN)
            if there is None:
                study.set_user_attr(PLAN, json.loads(json.dumps(plan)))
    except (SQLAlchemyError, sqlite3.Error, optuna.exceptions.StorageInternalError, AssertionError, KeyError) as error:
        raise UserError(
            f"The study {where} cannot be read or written ({_first_line(error)}). Move it away to begin a new one: the trials in "
            f"{directory / TRIALS} stay, and a fit that is finished there is not made again."
        ) from error
    differing = [] if there is None else differences(dict(there), json.loads(json.dumps(plan)))
    if differing:
        raise UserError(f"{directory} holds another sweep: {'; '.join(differing)}. Name another directory with --out.")
    return Study(study, sweep, directory, most)


def _storage(url: str) -> Any:
    import optuna

    waiting = {"connect_args": {"timeout": WAIT_SECONDS}} if url.startswith("sqlite:") else {}
    return optuna.storages.RDBStorage(url, engine_kwargs=waiting)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200]


@contextmanager
def _turn(directory: Path) -> Iterator[None]:
    """Wait until no other process asks or tells. The kernel ends the turn of a process that ends."""
    with files.writing(directory / ".turn"):
        handle = (directory / ".turn").open("w")
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def plain(result: TrialResult) -> dict[str, Any]:
    """A result as JSON holds it."""
    values = dict(vars(result))
    values["curve"] = [list(each) for each in result.curve]
    return values


def read_result(directory: Path) -> TrialResult | None:
    """What a trial's file says; None where there is none, or a damaged one."""
    try:
        values = json.loads((directory / RESULT).read_text(encoding="utf-8"))
        curve = tuple((int(step), float(loss)) for step, loss in values.pop("curve"))
        return TrialResult(**{**values, "curve": curve, "directory": str(directory)})
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, TypeError, ValueError, KeyError):
        return None


def metric_curve(directory: Path, metric: str) -> list[tuple[int, float]]:
    """The metric at each validation of a trial's fit after the first update: (update, value)."""
    path = directory / "metrics.jsonl"
    events = files.read_json_lines(path) if path.is_file() else []
    field = {"validation_loss": "loss", "validation_perplexity": "loss"}.get(metric, metric)
    found = [(int(each["step"]), float(each[field])) for each in events if each["event"] == "validation" and field in each]  # type: ignore[call-overload, arg-type]  # JSON
    return [(step, math.exp(value) if metric == "validation_perplexity" else value) for step, value in found if step > 0]


def metric_history(directory: Path, metric: str) -> list[float]:
    """The values of `metric_curve`."""
    return [value for _, value in metric_curve(directory, metric)]
