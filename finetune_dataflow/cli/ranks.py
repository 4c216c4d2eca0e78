"""`mlx.launch … run.py train`: what ranks do before and around a fit that they make together (docs/scaling.md)."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import finetune_dataflow
from finetune_dataflow import engine
from finetune_dataflow.cli.cache import cached_driver
from finetune_dataflow.cli.options import Options
from finetune_dataflow.engine import ranks
from finetune_dataflow.errors import UserError

# Where things are may differ from machine to machine; what is there is compared later. Rank 0 alone reports.
PLACES = (
    "data_path", "model_id", "output_dir", "resume_adapter_file", "save_adapter_to", "few_shot_file", "loom_file",
    "report_to", "project_name", "frozen_states_gb",
)  # fmt: skip
READ = ["source_rows", "shaped_rows", "records", "dataset_fingerprint"]


def ready(team: ranks.Team, chain: Sequence[Options]) -> Options:
    """The one configuration that ranks train together, the same on all of them, and the ranks connected.

    Raises UserError, on all ranks, where there are several configurations, nothing is fitted, or versions or options differ.
    """
    if len(chain) > 1:
        raise UserError(
            f"{len(chain)} configurations are trained one after another, each from the adapter before it. Ranks train one "
            "together: give one -c, and the adapter of the run before in resume_adapter_file."
        )
    options = chain[0]
    if options.start != "base":
        raise UserError("start=presaved fits nothing that ranks could share. Evaluate without mlx.launch or mpirun.")
    code = engine.code_versions.package_version()[:8]
    versions = {"version of finetune-dataflow": f"{finetune_dataflow.__version__} (code {code})"}
    versions |= {f"version of {name}": importlib.metadata.version(name) for name in ("mlx", "mlx-lm")}
    modules = {"own modules": [Path(str(each.__file__)).name for each in options.modules]} if options.modules else {}
    team.agree({**versions, **modules, **{name: each for name, each in options.inputs.items() if name not in PLACES}})
    team.connect()
    return options


def read_alike(team: ranks.Team, dr: Any, options: Options) -> dict[str, Any]:
    """The data, read, and the same on all ranks: looked at before the base model is. Raises UserError where it is not."""
    read: dict[str, Any] = dr.execute(READ, inputs=options.inputs)
    team.agree({"rows of the data": len(read["records"]), "fingerprint of the data": read["dataset_fingerprint"]})
    return read


def agree(team: ranks.Team, prepared: dict[str, Any]) -> None:
    """Raise UserError, on all ranks, where they are not about to make the same fit: base model, tokens, settings, plan."""
    plan = {f"planned {name}": value for name, value in asdict(prepared["fit_plan"]).items()}
    team.agree({**prepared["run_identity"].values, **plan, **prepared["trained_parameters"]})


def help_fit(team: ranks.Team, options: Options, wanted: Sequence[str]) -> None:
    """What a rank other than 0 does: prepare the same, and compute its share of the fit, where rank 0 makes one.

    It keeps nothing: what a fit writes goes to a temporary directory of its own.
    """
    options = replace(options, inputs={name: value for name, value in options.inputs.items() if name != "report_to"})
    dr = cached_driver(options)
    read = read_alike(team, dr, options)
    prepared = dr.execute(list(wanted), inputs=options.inputs, overrides=read)
    agree(team, prepared)
    if not team.announce("fit"):
        return
    with tempfile.TemporaryDirectory(prefix="finetune-dataflow-rank-") as directory:
        inputs = {**options.inputs, "output_dir": str(Path(directory) / "run")}
        dr.execute(["finished_fit"], inputs=inputs, overrides={**read, **prepared})


def line(team: ranks.Team) -> str:
    """Who trains together."""
    hosts = ", ".join(dict.fromkeys(team.place.hosts))
    return f"{team.size} ranks train together by MLX's {team.place.backend}{f', on {hosts}' if hosts else ''}."
