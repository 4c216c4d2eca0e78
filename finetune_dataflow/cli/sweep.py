"""`run.py sweep FILE`: a search for good settings, as a sweep file of Weights & Biases describes it, without an account."""

from __future__ import annotations

import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_dataflow.cli.options import FLAGS, Options, build_driver, coerced, graph_inputs, parse
from finetune_dataflow.errors import UserError

if TYPE_CHECKING:
    from finetune_dataflow.sweeps.agent import AgentJob
    from finetune_dataflow.sweeps.clusters import Cluster
    from finetune_dataflow.sweeps.results import SweepResult
    from finetune_dataflow.sweeps.study import Study
    from finetune_dataflow.sweeps.sweep_file import SweepFile

HELP = """\
Search for good settings: trials as a Weights & Biases sweep file describes them, judged on the validation rows; the best
trial becomes a run of its own, with hold-out scores, verdict and report. No account is needed. Stopped or killed, the same
command goes on.

usage: run.py sweep FILE.yaml [--out DIR] [options]

  FILE                 method (grid, random, bayes), metric, parameters, early_terminate (docs/sweeps.md)
  --out DIR            the sweep's directory: study.db, trials/0 ..., best, sweep.html (default: runs/sweep-<file>-<fingerprint>)
  --trials N           at most so many trials (default: the file's run_cap; a grid whole, else 10)
  --jobs N             so many trials at the same time, each in a process of its own (default: 1; one for each machine of a
                       cluster with an address)
  --executor NAME      where they run: local, ray or dask (default: local; docs/sweeps.md, "Over machines")
  --executor-address A the cluster's address: host:port, ray://host:10001, tcp://host:8786 (default: a cluster on 127.0.0.1,
                       started for the sweep and shut down after it)
  --storage URL        keep the study in this database instead of an SQLite file in DIR: any URL that Optuna takes, journal:///FILE,
                       redis://HOST or grpc://HOST:PORT
  --artifacts URL      put each trial that ends there, a shared path or a URL of fsspec (s3://bucket/sweeps), whole or not at all;
                       machines of a cluster then need not share DIR
  --wandb-project P    log each trial to this project of Weights & Biases (docs/tracking-wandb.md)
  --wandb-run NAME     what the trials are called there: NAME-0, NAME-1, ... (default: the sweep's name)
  any option of train  what all trials have in common: --data FILE, -c FILE.yaml, --epochs 2 ...
  -h, --help           this text
"""
OWN = (
    "--out",
    "--trials",
    "--jobs",
    "--executor",
    "--executor-address",
    "--storage",
    "--artifacts",
    "--wandb-project",
    "--wandb-run",
)
USUAL_TRIALS = 10
# What a trial may not change, and why.
SPLIT = "it decides which rows are held out, and trials that differ in it cannot be compared"
FIXED = {
    "output_dir": "each trial has a directory of its own",
    "save_adapter_to": "all trials would write the same place",
    **dict.fromkeys(("prompt", "colorize", "frozen_states_gb", "reuse_replies"), "it changes no score"),
    **dict.fromkeys(("report_to", "project_name"), "trials are logged by --wandb-project"),
}


@dataclass(frozen=True)
class SweepOptions:
    """What the command line says of the sweep itself; `arguments` are the others, as they stood there."""

    file: Path
    out: str
    trials: int | None
    jobs: int | None
    storage: str
    project: str
    run_name: str
    arguments: tuple[str, ...]
    executor: str = "local"
    address: str = ""
    artifacts: str = ""


def sweep(arguments: Sequence[str]) -> int:
    """Run a sweep, or go on with it, promote its best trial, print the table and write the page. Returns 0, or 1 where no
    trial came to an end.
    """
    if {"-h", "--help"} & {*arguments}:
        print(HELP, end="")
        return 0
    own = sweep_options(arguments)
    if find_spec("optuna") is None:
        raise UserError("Sweeps need Optuna: pip install 'finetune-dataflow[sweep]'.")
    from finetune_dataflow.cli.train import check_settings
    from finetune_dataflow.engine import files
    from finetune_dataflow.sweeps.agent import METRICS, spellings
    from finetune_dataflow.sweeps.clusters import check_executor
    from finetune_dataflow.sweeps.sweep_file import read_sweep

    check_executor(own.executor, own.address)
    if own.project:
        from finetune_dataflow.engine.reporting import reporting_settings

        reporting_settings("wandb", own.project)  # raises before anything is done where wandb is missing
    options = parse(list(own.arguments), "base")
    search = read_sweep(own.file, *spellings(options), METRICS)
    check_parameters(search, options)
    check_settings([options])
    for notice in search.notices:
        print(notice)
    with ExitStack() as held:
        cluster = _reached(own, held)
        plan = common_plan(search, options)
        default = Path("runs") / f"sweep-{own.file.stem}-{files.fingerprint(plan)[:8]}"
        directory = files.user_path(own.out) if own.out else default
        fresh = not directory.exists()
        job = _job(own, search, options, plan, files.make_output_directory(directory))
        try:
            job, agents = _ready(own, options, job, cluster)
        except UserError:
            if fresh and not any(directory.iterdir()):
                directory.rmdir()
            raise
        with files.locked(directory):
            study = _worked(job, search, cluster, agents)
            held.close()  # the cluster is not needed any more
            return _finished(own, search, options, job, study)


def _reached(own: SweepOptions, held: ExitStack) -> Cluster | None:
    """The cluster that is meant, held open by `held`. Raises UserError where it, or the study's storage, does not answer."""
    from finetune_dataflow.sweeps.clusters import cluster
    from finetune_dataflow.sweeps.storage import check_storage

    if own.storage:
        check_storage(own.storage)
    return None if own.executor == "local" else held.enter_context(cluster(own.executor, own.address, own.jobs or 1))


def _ready(own: SweepOptions, options: Options, job: AgentJob, cluster: Cluster | None) -> tuple[AgentJob, int]:
    """The job and the number of agents, once everybody is known to see what they need. Raises UserError where one does not."""
    from finetune_dataflow.sweeps import probe
    from finetune_dataflow.sweeps.artifacts import Artifacts
    from finetune_dataflow.sweeps.storage import network_file_system, redacted

    database = _sqlite_file(own.storage) if own.storage else Path(job.directory) / "study.db"
    kind = network_file_system(database.parent) if database is not None else None
    if kind is not None and (cluster is not None or own.storage):
        print(
            f"{database} is on a network file system ({kind}), whose locks SQLite cannot always trust. With agents on several "
            "machines, a database server is safer: --storage postgresql://...",
            file=sys.stderr,
        )
    if cluster is None:
        if own.artifacts:
            token = f".probe-{job.session}"
            artifacts = Artifacts(own.artifacts, job.name)
            artifacts.check(token)
            artifacts.clear(token)
        return job, own.jobs or 1
    modules = [each.__file__ for each in options.modules]
    paths = probe.paths_of(options.inputs, [own.file, options.config, *modules, database if own.storage else None])
    said = probe.check_workers(cluster, job, paths)
    agents = own.jobs or (len({each["host"] for each in said}) if own.address else 1)
    where = redacted(own.address) or "127.0.0.1"
    print(f"{own.executor.capitalize()} at {where}: {agents} agent{'s' if agents > 1 else ''} on {_hosts(said)}.")
    return replace(job, threads=probe.threads_each(said, agents)), agents


def _hosts(said: Sequence[Mapping[str, Any]]) -> str:
    names = sorted({str(each["host"]) for each in said})
    return ", ".join(names) if len(names) <= 4 else f"{len(names)} machines"


def _sqlite_file(url: str) -> Path | None:
    return Path(url.partition(":///")[2]).absolute() if url.startswith("sqlite") and ":///" in url else None


def _worked(job: AgentJob, search: SweepFile, cluster: Cluster | None, agents: int) -> Study:
    """The study, once no trial is left to be done."""
    from finetune_dataflow.sweeps import running
    from finetune_dataflow.sweeps.agent import study_of

    study = study_of(replace(job, away=False), search, shared=cluster is not None)
    done = len([each for each in study.results() if each.state != "running"])
    print(f"{job.directory}: {done} trials done{'' if job.most is None else f' of at most {job.most}'}.")
    if cluster is None:
        running.run_here(job, agents, study)
    else:
        running.run_there(cluster, job, agents, study)
    return study


def _finished(own: SweepOptions, search: SweepFile, options: Options, job: AgentJob, study: Study) -> int:
    """Promote the best trial, write the page and print the table; the exit code."""
    from finetune_dataflow.engine import files
    from finetune_dataflow.sweeps import page, results
    from finetune_dataflow.sweeps.artifacts import Artifacts

    artifacts = Artifacts(own.artifacts, job.name) if own.artifacts else None
    if artifacts is not None:
        for number in range(len(study.study.get_trials(deepcopy=False))):
            artifacts.fetch(number, study.trial_directory(number), everything=False)
    found, best = study.results(), study.best()
    if artifacts is not None and best is not None:
        artifacts.fetch(best.number, study.trial_directory(best.number), everything=True)
    metrics = None if best is None else promoted(options, study, best.number)
    result = results.SweepResult(
        search.name or own.file.stem, str(own.file), search.method, search.metric.name, search.metric.goal,
        tuple(each.name for each in search.parameters), tuple(found), None if best is None else best.number, metrics, (),
    )  # fmt: skip
    logarithmic = frozenset(each.name for each in search.parameters if "log" in each.distribution)
    best_page = str(study.directory / "best") if best else ""
    files.write_text(study.directory / "sweep.html", page.sweep_page(result, logarithmic, best_page))
    print(*results.table(result), sep="\n")
    return _told(study.directory, result)


def _told(directory: Path, result: SweepResult) -> int:
    if result.best is None or result.best_metrics is None:
        print(
            f"\nNo trial came to an end. What went wrong is in {directory / 'trials'}/*/error.txt and {directory / 'sweep.html'}."
        )
        return 1
    print(f"\nThe best is trial {result.best}, on the validation rows. On hold-out rows that no trial saw:")
    print(result.best_metrics["verdict"])
    print(f"\nIts run is {directory / 'best'}; the page of the sweep is {directory / 'sweep.html'}.")
    return 0


def sweep_options(arguments: Sequence[str]) -> SweepOptions:
    """The sweep's own options, and the others. Raises UserError for what is missing or out of range."""
    own: dict[str, str] = {}
    others: list[str] = []
    files: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, separator, value = word.partition("=")
        if not word.startswith("-"):
            files.append(word)
        elif name in OWN:
            if name in own:
                raise UserError(f"{name} is given twice.")
            if not separator and not words:
                raise UserError(f"{name} needs a value.")
            own[name] = value if separator else words.pop(0)
        else:
            others.append(word)
            if not separator and word not in FLAGS and words:
                others.append(words.pop(0))
    if len(files) != 1:
        found = f"found {', '.join(map(repr, files))}" if files else "found none"
        raise UserError(f"Expected one sweep file, {found}: run.py sweep FILE.yaml [--out DIR] [options]")
    if "--wandb-run" in own and "--wandb-project" not in own:
        raise UserError("--wandb-run names trials in a project of Weights & Biases. Give --wandb-project, too.")
    return SweepOptions(
        Path(files[0]), own.get("--out", ""), _count(own, "--trials"), _count(own, "--jobs"), own.get("--storage", ""),
        own.get("--wandb-project", ""), own.get("--wandb-run", ""), tuple(others),
        own.get("--executor", "local"), own.get("--executor-address", ""), own.get("--artifacts", ""),
    )  # fmt: skip


def _count(own: dict[str, str], name: str) -> int | None:
    if name not in own:
        return None
    if not own[name].isdecimal() or int(own[name]) < 1:
        raise UserError(f"{name}={own[name]!r}: expected a whole number, 1 or more.")
    return int(own[name])


def check_parameters(search: SweepFile, options: Options) -> None:
    """Raise one UserError with every parameter that is no input, may not differ between trials, or has an impossible value."""
    from finetune_dataflow.cli.train import check_settings
    from finetune_dataflow.sweeps.agent import with_parameters
    from finetune_dataflow.sweeps.search import extremes

    dr = build_driver("base", options.modules)
    inputs, of_split = graph_inputs(dr), {each.name for each in dr.what_is_upstream_of("validation_set", "hold_out_set")}
    problems = []
    for parameter in search.parameters:
        place, owner = f"{search.path}: parameters.{parameter.name}", inputs[parameter.name]
        reason = SPLIT if parameter.name in of_split else FIXED.get(parameter.name)
        if reason is not None:
            problems.append(f"{place} cannot be searched: {reason}.")
            continue
        for value in extremes(parameter):
            try:
                check_settings([with_parameters(options, {parameter.name: coerced(owner, value)}, search.metric.name)])
            except UserError as error:
                problems.append(f"{place}: {error}")
    rouge = search.metric.name.startswith("rouge")
    best_by = options.inputs.get("best_metric", search.metric.name)
    if search.early_terminate is not None and (search.metric.name == "train_loss" or (rouge and best_by != search.metric.name)):
        problems.append(
            f"{search.path}: early_terminate needs a metric that is known at each validation of a fit, found "
            f"{search.metric.name}. Expected validation_loss, validation_perplexity, or a ROUGE score that is best_metric, too."
        )
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


def common_plan(search: SweepFile, options: Options) -> dict[str, Any]:
    """What makes a sweep this one and no other: its search, and what all trials have in common, data and model by content."""
    from dataclasses import asdict

    from finetune_dataflow.cli.train import data_lines
    from finetune_dataflow.engine import files

    wanted = ["validation_tokens", "dataset_fingerprint", "base_model_fingerprint", *PRINTED]
    made = build_driver("base", options.modules).execute(wanted, inputs=options.inputs)
    print(*data_lines(options.inputs["data_path"], made), sep="\n")
    swept = {each.name for each in search.parameters}
    aside = {*swept, "output_dir", "data_path", "model_id", "reuse_replies", "frozen_states_gb"}
    return {
        "method": search.method,
        "metric": {**asdict(search.metric), "target": None},  # a target may be set later
        "parameters": {each.name: {**asdict(each), "name": None} for each in search.parameters},
        "early_terminate": None if search.early_terminate is None else asdict(search.early_terminate),
        "inputs": {name: value for name, value in sorted(options.inputs.items()) if name not in aside},
        "dataset": made["dataset_fingerprint"],
        "base_model": None if "model_id" in swept else made["base_model_fingerprint"],
        "validation_rows": files.fingerprint(made["validation_tokens"].rows.tolist()),
    }


PRINTED = ["source_rows", "shaped_rows", "row_ledger", "data_quality", "label_audit", "hold_out_audit"]


def _job(own: SweepOptions, search: SweepFile, options: Options, plan: dict[str, Any], directory: Path) -> AgentJob:
    from finetune_dataflow.sweeps.agent import AgentJob

    usual = None if search.method == "grid" else USUAL_TRIALS
    most = own.trials or search.run_cap or usual
    return AgentJob(
        str(own.file.resolve()), str(directory.resolve()), own.arguments, plan, own.storage, most,
        int(options.inputs.get("random_state", 42)), uuid.uuid4().hex, str(Path.cwd()),
        project=own.project, run_name=own.run_name or search.name or own.file.stem, artifacts=own.artifacts,
        away=own.executor != "local",
    )  # fmt: skip


def promoted(options: Options, study: Study, number: int) -> dict[str, Any]:
    """The metrics of the best trial as a run of its own, evaluated on the hold-out, in the sweep's directory `best`.

    Its fit is the trial's: it is copied, not made again.
    """
    from finetune_dataflow.cli.train import run_once
    from finetune_dataflow.engine import files
    from finetune_dataflow.sweeps.agent import typed, with_parameters
    from finetune_dataflow.sweeps.search import PARAMETERS

    source, target, mark = study.trial_directory(number), study.directory / "best", study.directory / ".best"
    if not mark.is_file() or mark.read_text() != str(number) or not target.is_dir():
        mark.unlink(missing_ok=True)
        unfinished = study.directory / ".best-unfinished"
        for each in (unfinished, target):
            shutil.rmtree(each, ignore_errors=True)
        if source.is_dir():
            shutil.copytree(source, unfinished, ignore=shutil.ignore_patterns("checkpoints", ".lock", "trial.json", "wandb*"))
            unfinished.replace(target)
        files.write_text(mark, str(number))
    parameters = study.study.trials[number].user_attrs[PARAMETERS]
    inputs = graph_inputs(build_driver("base", options.modules))
    chosen = with_parameters(options, typed(parameters, inputs), study.sweep.metric.name)
    print(f"\nTrial {number} is promoted: its adapter is scored on the hold-out.\n")
    return run_once(replace(chosen, inputs={**chosen.inputs, "output_dir": str(target)}))[1]
