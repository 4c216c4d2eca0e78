"""The study of a sweep: which trials there are, whose turn it is, what came of them.

Optuna keeps it in a database, by default an SQLite file in the sweep's directory. Agents, in one process or in many, take
turns at asking for a trial; whoever has a trial holds the lock of its directory, and over several machines a claim in the
study as well. So a trial that the study believes to be running, and that nobody holds, was killed: it is done again, with
its own parameters, in its own directory.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_dataflow.engine import files
from finetune_dataflow.engine.settings import differences
from finetune_dataflow.errors import UserError
from finetune_dataflow.sweeps import search
from finetune_dataflow.sweeps.claims import ClaimLost, Desk, FileDesk, SharedDesk
from finetune_dataflow.sweeps.results import TrialResult
from finetune_dataflow.sweeps.storage import first_line, redacted, storage_errors, without_secrets
from finetune_dataflow.sweeps.storage import storage as storage_at
from finetune_dataflow.sweeps.sweep_file import SweepFile

if TYPE_CHECKING:
    import optuna

STUDY, TRIALS, RESULT = "study.db", "trials", "trial.json"
PLAN, ATTEMPTS, ERROR = "plan", "attempts", "error"  # user attributes of the study and its trials
MOST_ATTEMPTS = 2  # of one call of the sweep, for a trial whose process ends without a word
LOOKING_SECONDS = 1.0  # between two looks at trials that others hold

logger = logging.getLogger(__name__)


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
    """An opened study, its sweep, and where its files are. most: trials at most, None for as many as there are.

    desk: how trials are claimed here.
    """

    study: optuna.Study
    sweep: SweepFile
    directory: Path
    most: int | None
    desk: Desk

    def trial_directory(self, number: int) -> Path:
        """Where a trial's run is."""
        return self.directory / TRIALS / str(number)

    @contextmanager
    def claimed(self, session: str, patient: bool = False) -> Iterator[Claim | None]:
        """The next trial, held for the block: one that was killed, or a new one; None where there is none left.

        patient: trials that others hold are waited for, until they are told or turn out to be nobody's. Raises ClaimLost where
        another agent takes the trial meanwhile, and StopAsked where the sweep is stopped.
        """
        with ExitStack() as held:
            while True:
                with self.desk.turn():
                    claim = self._orphan(session, held) or self._new(session, held)
                if claim is not None or not patient or not self.running():
                    break
                time.sleep(LOOKING_SECONDS)
            if claim is not None:
                held.enter_context(self.desk.holding(claim.trial))
            yield claim

    def running(self) -> list[int]:
        """The numbers of the trials that have not ended."""
        return [each.number for each in self.study.get_trials(deepcopy=False) if not each.state.is_finished()]

    def tell(self, claim: Claim, result: TrialResult) -> None:
        """Write down what came of a trial. The trial's own file comes first: a kill in between loses nothing."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        files.write_json(claim.directory / RESULT, plain(result))
        states = {"complete": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}
        value = result.value if result.state == "complete" else None
        with self.desk.turn():
            try:
                if result.error:
                    claim.trial.set_user_attr(ERROR, result.error[:500])
                self.study.tell(claim.trial, value, states[result.state])
            except (UpdateFinishedTrialError, ValueError) as error:
                if claim.number in self.running():
                    raise
                raise ClaimLost(f"Trial {claim.number} was brought to an end by another agent.") from error

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
        """What each trial's metric was at each of its validations, from its own log, or as it was reported to the study."""
        return [
            metric_history(self.trial_directory(each.number), self.sweep.metric.name)
            or [value for _, value in sorted(each.intermediate_values.items())]
            for each in self.study.get_trials(deepcopy=False)
        ]

    def _bare(self, trial: optuna.trial.FrozenTrial) -> TrialResult:
        """What the study alone knows of a trial."""
        names = {"COMPLETE": "complete", "PRUNED": "stopped", "FAIL": "failed"}
        directory = self.trial_directory(trial.number)
        curve = metric_curve(directory, "validation_loss") or sorted(self._reported_losses(trial))
        parameters = dict(trial.user_attrs.get(search.PARAMETERS, {}))
        state, seconds = names.get(trial.state.name, "running"), trial.duration.total_seconds() if trial.duration else 0.0
        error = trial.user_attrs.get(ERROR, "its files are gone") if state == "failed" else None
        return TrialResult(trial.number, state, parameters, trial.value, {}, tuple(curve), seconds, error, str(directory))

    def _reported_losses(self, trial: optuna.trial.FrozenTrial) -> list[tuple[int, float]]:
        return [*trial.intermediate_values.items()] if self.sweep.metric.name == "validation_loss" else []

    def _orphan(self, session: str, held: ExitStack) -> Claim | None:
        import optuna
        from optuna.trial import TrialState

        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not self.desk.free(frozen):
                continue
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
        self.desk.take(trial)
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


def opened(
    sweep: SweepFile, directory: Path, storage: str, plan: Mapping[str, Any], most: int | None, seed: int,
    shared: bool = False, session: str = "", watched: bool = False, home: Path | None = None,
) -> Study:  # fmt: skip
    """The study whose trials are in `directory`, made where there is none.

    storage: a URL (`storage.storage`); empty for an SQLite file in the directory, or in `home`. plan: what makes this sweep this
    one. shared: agents elsewhere may be at it, too, so trials are claimed in the study; session and watched as in `SharedDesk`.
    Raises UserError where the study cannot be read, or is another sweep's, naming what differs.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    where = redacted(storage) or str(directory / STUDY)
    url = storage or database_url(home or directory)
    broken: tuple[type[Exception], ...] = (*storage_errors(), AssertionError, KeyError)
    try:
        with nullcontext() if shared else FileDesk(directory).turn():
            study = optuna.create_study(
                storage=storage_at(url),
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
    except broken as error:
        why = without_secrets(first_line(error), url)
        raise UserError(f"The study {where} cannot be read or written ({why}). {_way_on(storage, directory)}") from error
    differing = [] if there is None else differences(dict(there), json.loads(json.dumps(plan)))
    if differing:
        raise UserError(f"{directory} holds another sweep: {'; '.join(differing)}. Name another directory with --out.")
    desk = SharedDesk(study, session, watched) if shared else FileDesk(directory)
    return Study(study, sweep, directory, most, desk)


def database_url(directory: Path) -> str:
    """The URL of the SQLite file that a sweep's directory holds by itself."""
    return f"sqlite:///{(directory / STUDY).resolve()}"


def _way_on(storage: str, directory: Path) -> str:
    if storage:
        return "The same command goes on once it can be."
    return (
        f"Move it away to begin a new one: the trials in {directory / TRIALS} stay, and a fit that is finished there is not made "
        "again."
    )


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
