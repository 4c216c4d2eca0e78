"""Whether the machines of a cluster can do a sweep's work: they see its directory and its files, and have the same versions."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune_dataflow.errors import UserError
from finetune_dataflow.sweeps import probe_task
from finetune_dataflow.sweeps.agent import AgentJob
from finetune_dataflow.sweeps.artifacts import Artifacts
from finetune_dataflow.sweeps.clusters import Cluster
from finetune_dataflow.sweeps.storage import redacted

NEEDED = ("finetune_dataflow", "mlx", "mlx_lm", "hamilton", "optuna")


def check_workers(found: Cluster, job: AgentJob, paths: Sequence[str]) -> list[dict[str, Any]]:
    """What each machine or worker of a cluster says of itself.

    paths: the files and directories of this machine that every one of them must see with the same content. Raises one UserError
    with everything that is missing or differs, by machine.
    """
    token = f".probe-{uuid.uuid4().hex}"
    directory = "" if job.artifacts and job.storage else job.directory
    artifacts = Artifacts(job.artifacts, job.name) if job.artifacts else None
    root = f"{job.artifacts.rstrip('/')}/{job.name}" if job.artifacts else ""
    mark = Path(job.directory) / token
    try:
        mark.write_text(token, encoding="utf-8")
        if artifacts is not None:
            artifacts.check(token)
        said = found.everywhere("seen", directory, token, list(paths), root, list(NEEDED))
    finally:
        mark.unlink(missing_ok=True)
        if artifacts is not None:
            artifacts.clear(token)
    if not said:
        raise UserError(f"No machine of {found.named} offers a core. Start a worker, then give the same command again.")
    here, versions = {path: probe_task.contents(path) for path in paths}, probe_task.versions()
    problems = [
        f"  {name}: {problem}" for name, each in said.items() for problem in _problems(each, job, here, versions)
    ]  # fmt: skip
    if problems:
        raise UserError(
            f"{found.named[0].upper()}{found.named[1:]} cannot do this sweep. Nothing was begun.\n" + "\n".join(problems)
        )
    return [each for each in said.values() if not isinstance(each, str)]


def _problems(said: Mapping[str, Any] | str, job: AgentJob, here: Mapping[str, str], versions: Mapping[str, str]) -> list[str]:
    """What is wrong with one machine, in words."""
    if isinstance(said, str):
        return [said]
    problems = []
    if said.get("directory"):
        advice = "Give --storage and --artifacts that it reaches, or name a directory with --out that all machines share."
        problems.append(f"it cannot see the sweep's directory {job.directory} ({said['directory']}). {advice}")
    if said.get("url"):
        problems.append(f"it cannot see the artefacts at {redacted(job.artifacts)} ({said['url']}). Name a place that all reach.")
    for path, content in said["paths"].items():
        if not content:
            problems.append(f"{path} is not there.")
        elif content != here[path] and path not in job.storage:
            problems.append(f"{path} {content if content.startswith('it ') else 'has other content there than here'}.")
    if said["missing"]:
        problems.append(f"not installed there: {', '.join(said['missing'])}.")
    for name, version in versions.items():
        if said["versions"].get(name) not in (version, "none"):
            problems.append(f"{name} is {said['versions'].get(name)} there, {version} here.")
    return problems


def threads_each(said: Sequence[Mapping[str, Any]], agents: int) -> int:
    """How many cores each of so many agents has, spread evenly over the hosts."""
    cores = {str(each["host"]): int(each["cores"]) for each in said}
    return max(1, min(cores.values()) // -(-agents // len(cores)))


def paths_of(inputs: Mapping[str, Any], others: Sequence[str | Path | None]) -> list[str]:
    """The paths among a run's inputs that are there, and the other files that it is told of; absolute."""
    named = [str(each) for each in [*inputs.values(), *others] if isinstance(each, str | Path)]
    found = [Path(each).expanduser() for each in named if each]
    return list(dict.fromkeys(str(each.absolute()) for each in found if _there(each)))


def _there(path: Path) -> bool:
    try:
        return path.exists() and os.path.abspath(path) != os.getcwd()
    except (OSError, ValueError):
        return False
