"""One run, one directory: what run it holds, whether it may be used, and whether its fit is finished."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import finetune_dataflow
from finetune_dataflow.engine import files
from finetune_dataflow.engine.settings import differences
from finetune_dataflow.errors import UserError

if TYPE_CHECKING:
    from finetune_dataflow.engine.training import FitSummary

HISTORY, LINEAGE, METRICS = "metrics.jsonl", "lineage.json", "metrics.json"
HOLD_OUT_INPUTS = "hold_out_inputs.txt"
REPORT = "report.html"
CHECKPOINTS = "checkpoints"
TRACKED = "wandb-run-id"
WEIGHTS = Path("adapters") / "adapters.safetensors"
OWN_FILES = (
    HISTORY, LINEAGE, METRICS, HOLD_OUT_INPUTS, "config.yaml", "predictions.jsonl", "row_ledger.jsonl", "label_audit.html",
    "dag.svg", REPORT, "adapters", "adapters-last", "model", CHECKPOINTS,
)  # fmt: skip


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunIdentity:
    """What makes a run this run and no other.

    names: where its data and model came from; they do not count, their fingerprints do.
    settings: every other input that its result depends on, by name.
    fingerprints: of the data, the base model and, where one is given, the adapter.
    unbinding: settings that do not count, because they change what is written down and not what is learned.
    """

    names: dict[str, str]
    settings: dict[str, Any]
    fingerprints: dict[str, str]
    unbinding: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Any]:
        """Settings and fingerprints together."""
        return {**self.settings, **{f"fingerprint of {name}": value for name, value in self.fingerprints.items()}}

    @property
    def name(self) -> str:
        """The default name of the run's directory."""
        return f"{Path(self.names['data_path']).stem}-{files.fingerprint(self.values)[:8]}"

    @property
    def told(self) -> dict[str, Any]:
        """Everything of it, as a tracker shows it."""
        return {**self.names, **self.settings, **self.unbinding, "fingerprints": self.fingerprints}

    @property
    def adapter_notes(self) -> dict[str, object]:
        """What `adapter_config.json` says of the run besides what mlx-lm needs."""
        return {"model": self.names["model_id"], "fingerprints": self.fingerprints}


def run_identity(settings: dict[str, Any], fingerprints: dict[str, str], unbinding: dict[str, Any] | None = None) -> RunIdentity:
    """The identity of a run with these inputs."""
    names = ("data_path", "model_id")
    return RunIdentity(
        {name: settings[name] for name in names},
        {name: value for name, value in settings.items() if name not in names},
        fingerprints,
        unbinding or {},
    )


def location(output_dir: str, identity: RunIdentity) -> files.Location:
    """The run's directory: `output_dir`, or the default under `runs`."""
    return files.Location(files.user_path(output_dir) if output_dir else Path("runs") / identity.name)


@contextmanager
def held(output_dir: str, identity: RunIdentity) -> Iterator[Path]:
    """The run's directory, made, marked as this run's and locked for the block.

    Raises UserError where it holds another run, naming what differs, or is in use by one.
    """
    directory = location(output_dir, identity)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"The output directory {directory} is a file. Name a directory.")
    check_unclaimed(directory, identity)
    files.make_output_directory(directory)
    with files.locked(directory):
        check_unclaimed(directory, identity)  # again: another run may have come first
        if _identity_there(directory) != _plain_values(identity):
            (directory / TRACKED).unlink(missing_ok=True)  # another run is another one of a tracker's, too
            files.write_json(directory / LINEAGE, asdict(identity))
        yield directory


def check_unclaimed(directory: Path, identity: RunIdentity) -> None:
    """Raise UserError where `directory` holds another run, or files that a run would overwrite.

    A run that left no weights, metrics or checkpoints, because it was stopped by its first error, gives its directory up.
    """
    if not (directory / LINEAGE).is_file():
        taken = [name for name in OWN_FILES if (directory / name).exists()]
        if taken:
            raise UserError(
                f"The output directory {directory} has {', '.join(taken)}, but no {LINEAGE} that says which run made them. "
                "Name another output directory."
            )
        return
    there, asked = _identity_there(directory), _plain_values(identity)
    if there is None:
        raise UserError(f"{directory / LINEAGE} cannot be read. Name another output directory.")
    if not any((directory / name).exists() for name in (WEIGHTS, METRICS, CHECKPOINTS)):
        return
    differing = differences(there, asked)
    if differing:
        raise UserError(
            f"The output directory {directory} holds another run: {'; '.join(differing)}. "
            "Name another output directory, or leave it out for one of the run's own."
        )


def _identity_there(directory: Path) -> dict[str, Any] | None:
    """What makes the run in `directory` that run; None where nothing readable says so."""
    try:
        held = json.loads((directory / LINEAGE).read_text(encoding="utf-8"))
        return RunIdentity({}, held["settings"], held["fingerprints"]).values
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None


def _plain_values(identity: RunIdentity) -> dict[str, Any]:
    return dict(json.loads(json.dumps(identity.values)))


def finished_fit(directory: Path) -> FitSummary | None:
    """The summary of the fit that `directory` holds, or None where it was not finished or its weights are gone."""
    from finetune_dataflow.engine.arrays import is_whole
    from finetune_dataflow.engine.training import FitSummary

    if not (directory / HISTORY).is_file() or not is_whole(directory / WEIGHTS):
        return None
    last = files.read_json_lines(directory / HISTORY)[-1:]
    known = fields(FitSummary)
    needed = {each.name for each in known if each.default is MISSING}  # of what came later, an older fit says nothing
    if not last or last[0]["event"] != "end" or not needed <= set(last[0]):
        return None
    return FitSummary(**{each.name: last[0][each.name] for each in known if each.name in last[0]})  # type: ignore[arg-type]


def warn_of_hold_outs_beside(directory: Path, used: frozenset[str]) -> None:
    """Say which runs beside `directory` hold out inputs that this fit uses: their verdicts do not bind its adapter."""
    for path in sorted(directory.resolve().parent.glob(f"*/{HOLD_OUT_INPUTS}")):
        if path.parent == directory.resolve():
            continue
        met = used & set(path.read_text(encoding="utf-8").split())
        if met:
            logger.warning(
                "This fit uses %d inputs that are hold-out rows of the run %s: compare the two on other rows.",
                len(met),
                path.parent,
            )


def finished_metrics(directory: Path, identity: RunIdentity, evaluation: dict[str, Any]) -> dict[str, Any] | None:
    """The metrics of the run that `directory` holds, or None where no evaluation like this one was finished."""
    from finetune_dataflow.engine.adapters import adapter_fingerprint

    fitted_here = "adapter" not in identity.fingerprints
    needed = [Path(REPORT), *([WEIGHTS] if fitted_here else [])]
    if _identity_there(directory) != _plain_values(identity) or not all((directory / each).is_file() for each in needed):
        return None
    try:
        lineage = json.loads((directory / LINEAGE).read_text(encoding="utf-8"))
        if fitted_here and lineage.get("adapter") != adapter_fingerprint(directory / WEIGHTS.parent):
            return None  # somebody wrote another adapter there: these are not its scores
        metrics = json.loads((directory / METRICS).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return metrics if isinstance(metrics, dict) and metrics.get("evaluation") == evaluation else None


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on."""
    packages = ("mlx", "mlx-lm", "apache-hamilton", "transformers", "tokenizers", "rouge-score")
    return {
        "finetune-dataflow": finetune_dataflow.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }
