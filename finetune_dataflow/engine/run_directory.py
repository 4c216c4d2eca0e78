"""One run, one directory: what run it holds, whether it may be used, and whether its fit is finished."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import finetune_dataflow
from finetune_dataflow.engine import files
from finetune_dataflow.errors import UserError

if TYPE_CHECKING:
    from finetune_dataflow.engine.training import FitSummary

HISTORY, LINEAGE, METRICS = "metrics.jsonl", "lineage.json", "metrics.json"
OWN_FILES = (HISTORY, LINEAGE, METRICS, "config.yaml", "predictions.jsonl", "row_ledger.jsonl", "adapters")


@dataclass(frozen=True)
class RunIdentity:
    """What makes a run this run and no other.

    names: where its data and model came from; they do not count, their fingerprints do.
    settings: every other input that its result depends on, by name.
    fingerprints: of the data, the base model and, where one is given, the adapter.
    """

    names: dict[str, str]
    settings: dict[str, Any]
    fingerprints: dict[str, str]

    @property
    def values(self) -> dict[str, Any]:
        """Settings and fingerprints together."""
        return {**self.settings, **{f"fingerprint of {name}": value for name, value in self.fingerprints.items()}}

    @property
    def name(self) -> str:
        """The default name of the run's directory."""
        return f"{Path(self.names['data_path']).stem}-{files.fingerprint(self.values)[:8]}"

    @property
    def adapter_notes(self) -> dict[str, object]:
        """What `adapter_config.json` says of the run besides what mlx-lm needs."""
        return {"model": self.names["model_id"], "fingerprints": self.fingerprints}


def run_identity(settings: dict[str, Any], fingerprints: dict[str, str]) -> RunIdentity:
    """The identity of a run with these inputs."""
    names = ("data_path", "model_id")
    return RunIdentity(
        {name: settings[name] for name in names},
        {name: value for name, value in settings.items() if name not in names},
        fingerprints,
    )


def location(output_dir: str, identity: RunIdentity) -> Path:
    """The run's directory: `output_dir`, or the default under `runs`."""
    return Path(output_dir).expanduser() if output_dir else Path("runs") / identity.name


def claimed(output_dir: str, identity: RunIdentity) -> Path:
    """The run's directory, made and marked as this run's; UserError where it holds another run, naming what differs."""
    directory = location(output_dir, identity)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"The output directory {directory} is a file. Name a directory.")
    check_unclaimed(directory, identity)
    files.make_output_directory(directory)
    if not (directory / LINEAGE).exists():
        files.write_json(directory / LINEAGE, asdict(identity))
    return directory


def check_unclaimed(directory: Path, identity: RunIdentity) -> None:
    """Raise UserError where `directory` holds another run, or files that a run would overwrite."""
    record = directory / LINEAGE
    if not record.is_file():
        taken = [name for name in OWN_FILES if (directory / name).exists()]
        if taken:
            raise UserError(
                f"The output directory {directory} has {', '.join(taken)}, but no {LINEAGE} that says which run made them. "
                "Name another output directory."
            )
        return
    try:
        held = json.loads(record.read_text(encoding="utf-8"))
        there = RunIdentity({}, held["settings"], held["fingerprints"]).values
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{record} cannot be read ({error!r}). Name another output directory.") from error
    asked = json.loads(json.dumps(identity.values))
    differing = [
        f"{name} is {_short(there.get(name))} there and {_short(asked.get(name))} here"
        for name in sorted({*there, *asked})
        if there.get(name) != asked.get(name)
    ]
    if differing:
        raise UserError(
            f"The output directory {directory} holds another run: {'; '.join(differing)}. "
            "Name another output directory, or leave it out for one of the run's own."
        )


def finished_fit(directory: Path) -> FitSummary | None:
    """The summary of the fit that `directory` holds, or None where it was not finished."""
    from finetune_dataflow.engine.training import FitSummary

    if not (directory / HISTORY).is_file():
        return None
    last = files.read_json_lines(directory / HISTORY)[-1:]
    if not last or last[0]["event"] != "end":
        return None
    return FitSummary(**{each.name: last[0][each.name] for each in fields(FitSummary)})  # type: ignore[arg-type]  # JSON


def finished_metrics(directory: Path, evaluation: dict[str, Any]) -> dict[str, Any] | None:
    """The metrics of the run that `directory` holds, or None where no evaluation with these settings was finished."""
    path = directory / METRICS
    if not path.is_file():
        return None
    lineage = json.loads((directory / LINEAGE).read_text(encoding="utf-8"))
    return json.loads(path.read_text(encoding="utf-8")) if lineage.get("evaluation") == evaluation else None


def _short(value: object) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:20]}…"


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on."""
    packages = ("mlx", "mlx-lm", "apache-hamilton", "transformers", "tokenizers", "rouge-score")
    return {
        "finetune-dataflow": finetune_dataflow.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }
