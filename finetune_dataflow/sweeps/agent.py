"""An agent of a sweep: it takes a trial from the study, runs it through the dataflow, says what came of it, and goes on.

A trial is the dataflow's `training_and_validation_set_metrics` under start="base": it prepares, fits and looks at the
validation set. No trial asks for a node that looks at the hold-out's replies or losses.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from finetune_dataflow import engine
from finetune_dataflow.cli.cache import cached_driver
from finetune_dataflow.cli.options import ALIASES, RIVALS, Input, Options, build_driver, coerced, graph_inputs, parse
from finetune_dataflow.engine.colors import plain_text
from finetune_dataflow.engine.event_log import listening
from finetune_dataflow.engine.user_cache import user_cache_directory
from finetune_dataflow.errors import UserError
from finetune_dataflow.sweeps import early_stop
from finetune_dataflow.sweeps.artifacts import Artifacts
from finetune_dataflow.sweeps.claims import ClaimLost
from finetune_dataflow.sweeps.results import TrialResult
from finetune_dataflow.sweeps.study import (
    MOST_ATTEMPTS,
    RESULT,
    Claim,
    Study,
    metric_curve,
    metric_history,
    opened,
    plain,
    read_result,
)
from finetune_dataflow.sweeps.sweep_file import SweepFile, read_sweep

METRICS = (
    "train_loss", "validation_loss", "validation_perplexity", "rouge1", "rouge2", "rougeL", "rougeLsum",
)  # fmt: skip
ASKED = ["training_and_validation_set_metrics", "config_file"]
SHARED = [
    "source_rows", "shaped_rows", "records", "leaking_rows", "row_ledger", "data_quality", "label_audit", "hold_out_audit",
    "train_set", "validation_set", "train_tokens", "validation_tokens", "validation_rows", "base_model_path",
    "base_model_fingerprint", "chat_template", "rendering_fingerprints", "preparation_settings",
]  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AgentJob:
    """What an agent is told, all of it text and numbers, so that it can be told to a process anywhere.

    arguments: the options of the run as they stood on the command line. session: a name of this call of the sweep. storage: a
    URL, perhaps with a password, which is why it is in no message. artifacts: a URL that ended trials are put at. away: the
    agent is a task of a cluster, perhaps on another machine; it works in a process of its own, and stops when the sweep does.
    patient: it waits for trials that others hold.
    """

    file: str
    directory: str
    arguments: tuple[str, ...]
    plan: dict[str, Any]
    storage: str = field(default="", repr=False)
    most: int | None = None
    seed: int = 42
    session: str = ""
    workplace: str = ""
    threads: int | None = None
    project: str = ""
    run_name: str = ""
    artifacts: str = field(default="", repr=False)
    away: bool = False
    patient: bool = False

    @property
    def place(self) -> Path:
        """Where this agent's trials are: the sweep's directory, or one of this machine where they are put elsewhere."""
        if not (self.away and self.artifacts):
            return Path(self.directory)
        return engine.files.make_output_directory(user_cache_directory() / "sweeps" / self.name)

    @property
    def name(self) -> str:
        """What tells this sweep from others."""
        return engine.files.fingerprint(self.plan)[:16]


class TrialStopped(Exception):
    """A trial that early termination ended."""


def work(job: AgentJob) -> list[int]:
    """Take trials until there are none left; the numbers of those that were brought to an end here."""
    if job.workplace and Path.cwd() != Path(job.workplace) and Path(job.workplace).is_dir():
        os.chdir(job.workplace)
    options = parse(list(job.arguments), "base")
    inputs = graph_inputs(build_driver("base", options.modules))
    sweep = read_sweep(Path(job.file), *spellings(options), METRICS)
    study = study_of(job, sweep)
    artifacts = Artifacts(job.artifacts, job.name) if job.artifacts else None
    ended: list[int] = []
    while True:
        try:
            with study.claimed(job.session, job.patient) as claim:
                if claim is None:
                    return ended
                result = read_result(claim.directory) or _attempted(
                    job, options, study, replace(claim, parameters=typed(claim.parameters, inputs))
                )
                _told(study, claim, result, artifacts)
                if artifacts is not None and job.place != Path(job.directory):
                    shutil.rmtree(claim.directory, ignore_errors=True)
        except ClaimLost as lost:
            logger.warning("%s", lost)
            continue
        ended.append(claim.number)
        logger.info("%s", told(result, sweep, study.best()))


def study_of(job: AgentJob, sweep: SweepFile, shared: bool = False) -> Study:
    """The study that an agent takes its trials from; shared: with agents elsewhere, whatever this one is."""
    shared = shared or job.away or bool(job.storage)
    return opened(
        sweep, job.place, job.storage, job.plan, job.most, job.seed, shared, job.session, watched=job.away,
        home=Path(job.directory),
    )  # fmt: skip


def _told(study: Study, claim: Claim, result: TrialResult, artifacts: Artifacts | None) -> None:
    """Write down what came of a trial, once its files are where the rest of the sweep finds them."""
    if artifacts is not None:
        engine.files.write_json(claim.directory / RESULT, plain(result))
        artifacts.put(claim.number, claim.directory)
    study.tell(claim, result)


def typed(parameters: Mapping[str, Any], inputs: Mapping[str, Input]) -> dict[str, Any]:
    """A trial's parameters with the types of their inputs: a YAML's 1 is a number that Hamilton refuses for 1.0."""
    return {name: coerced(inputs[name], value) for name, value in parameters.items()}


def spellings(options: Options) -> tuple[Callable[[str], str | None], Sequence[str]]:
    """The input that a spelling in a sweep file means, None where there is none; and the spellings that there are."""
    inputs = graph_inputs(build_driver("base", options.modules))

    def input_name(spelling: str) -> str | None:
        name = ALIASES.get(spelling, spelling).replace("-", "_")
        return name if name in inputs else None

    return input_name, [*inputs, *ALIASES]


def told(result: TrialResult, sweep: SweepFile, best: TrialResult | None) -> str:
    """A line on a trial that ended."""
    values = ", ".join(f"{name}={value}" for name, value in result.parameters.items())
    value = f" {sweep.metric.name} {result.value:.4g}" if result.value is not None else ""
    if result.state == "failed":
        outcome = f" failed: {(result.error or 'for no stated reason').splitlines()[0]}"
    else:
        outcome = f" stopped early at{value}" if result.state == "stopped" else value
    ahead = f"; best so far: trial {best.number}, {best.value:.4g}" if best is not None and best.value is not None else ""
    return plain_text(f"Trial {result.number} ({values}):{outcome} in {result.seconds:.0f} s{ahead}")


def _attempted(job: AgentJob, options: Options, study: Study, claim: Claim) -> TrialResult:
    """What comes of a trial: its metrics, or why there are none."""
    started = time.monotonic()

    def result(state: str, value: float | None, metrics: dict[str, float], error: str | None = None) -> TrialResult:
        curve = tuple(metric_curve(claim.directory, "validation_loss"))
        seconds, directory = time.monotonic() - started, str(claim.directory)
        return TrialResult(claim.number, state, claim.parameters, value, metrics, curve, seconds, error, directory)

    name, maximize = study.sweep.metric.name, study.sweep.metric.goal == "maximize"
    if claim.attempts > MOST_ATTEMPTS:
        return result("failed", None, {}, f"Its process ended {MOST_ATTEMPTS} times without a word: was it out of memory?")
    try:
        metrics = _metrics(job, with_parameters(options, claim.parameters, name), study, claim)
    except TrialStopped:
        history = metric_history(claim.directory, name)
        return result("stopped", max(history) if maximize else min(history), {})
    except Exception as error:  # whatever it is: a failed trial is a row of the table, and the others go on
        (claim.directory / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return result("failed", None, {}, str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
    if not math.isfinite(metrics[name]):
        return result("failed", None, {}, f"{name} is {metrics[name]}.")
    return result("complete", metrics[name], metrics)


def with_parameters(options: Options, parameters: Mapping[str, Any], metric: str) -> Options:
    """The options with a trial's parameters in place of what they set, and of what says the same thing in other words.

    A fit that is judged by a ROUGE score keeps the adapter that is best by it, unless best_metric says otherwise.
    """
    replaced = {name for group in RIVALS if {*group} & {*parameters} for name in group}
    kept = {name: value for name, value in options.inputs.items() if name not in replaced}
    judged = {"best_metric": metric} if metric.startswith("rouge") else {}
    return replace(options, inputs={**judged, **kept, **parameters})


def shared_nodes(options: Options, swept: frozenset[str]) -> dict[str, Any]:
    """What is the same in all trials: the prepared nodes that depend on no swept input, computed once a process."""
    inputs = tuple(sorted((name, repr(value)) for name, value in options.inputs.items() if name not in swept))
    return _shared(options, swept, inputs)


_known: dict[Any, dict[str, Any]] = {}


def _shared(options: Options, swept: frozenset[str], key: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    if (swept, key) not in _known:
        independent = [name for name in SHARED if not swept & _upstream(options.modules, name)]
        _known[swept, key] = cached_driver(options).execute(independent, inputs=options.inputs) if independent else {}
    return _known[swept, key]


@lru_cache(maxsize=256)
def _upstream(modules: tuple[Any, ...], name: str) -> frozenset[str]:
    return frozenset(each.name for each in build_driver("base", modules).what_is_upstream_of(name))


def _metrics(job: AgentJob, options: Options, study: Study, claim: Claim) -> dict[str, float]:
    """The trial's training_and_validation_set_metrics, its run in its directory."""
    sweep = study.sweep
    options = replace(options, inputs={**options.inputs, "output_dir": str(claim.directory)})
    shared = shared_nodes(options, frozenset([*(each.name for each in sweep.parameters), "best_metric", "output_dir"]))
    dr = cached_driver(options)
    if "validation_tokens" not in shared:
        tokens = dr.execute(["validation_tokens"], inputs=options.inputs, overrides=shared)["validation_tokens"]
        _check_rows(tokens.rows.tolist(), job.plan["validation_rows"])

    def watched(event: Mapping[str, object]) -> None:
        if event["event"] != "validation" or not event["step"]:
            return
        curve = metric_curve(claim.directory, sweep.metric.name)
        if not curve:
            return
        step, value = curve[-1]
        claim.trial.report(value, step)
        if sweep.early_terminate is not None:
            others = [each for number, each in enumerate(study.curves()) if number != claim.number]
            if early_stop.stop([each for _, each in curve], others, sweep.metric.goal, sweep.early_terminate):
                raise TrialStopped

    with ExitStack() as heard:
        summarise = heard.enter_context(_reported(job, sweep, claim, options))
        heard.enter_context(listening(watched))
        made = dr.execute(ASKED, inputs=options.inputs, overrides=shared)
        summarise(made[ASKED[0]])
    return dict(made[ASKED[0]])


@contextmanager
def _reported(job: AgentJob, sweep: SweepFile, claim: Claim, options: Options) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Report the trial to Weights & Biases while the block lasts, where a project is named; yields what takes its metrics."""
    from finetune_dataflow.engine import reporting

    if not job.project:
        yield lambda metrics: None
        return
    name = f"{job.run_name}-{claim.number}"
    settings = reporting.reporting_settings("wandb", job.project, name)
    config = {**options.inputs, **claim.parameters, "sweep_method": sweep.method}
    stopped: TrialStopped | None = None
    with (
        reporting.reporting(settings, claim.directory, config, name, group=job.run_name, job_type="sweep-trial") as reporter,
        listening(reporter),
    ):
        try:
            yield reporter.summary
        except TrialStopped as stop:  # an end as it should be, there
            stopped = stop
    if stopped is not None:
        raise stopped


def _check_rows(rows: list[int], expected: str) -> None:
    """Raise UserError where a trial's validation rows are not the sweep's: their scores could not be compared."""
    if engine.files.fingerprint(rows) != expected:
        raise UserError(
            "Its validation rows are not those of the other trials, because its parameters change which rows are used: their "
            "scores cannot be compared."
        )
