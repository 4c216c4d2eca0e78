"""Whether and where a run is reported to, checked without importing what does it."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass

from finetune_dataflow.engine.settings import all_of
from finetune_dataflow.errors import UserError, nearest

SERVICES = ("wandb",)
PROJECT = "finetune-dataflow"
LONGEST_PROJECT = 128  # characters, as Weights & Biases has it


@dataclass(frozen=True)
class ReportingSettings:
    """Where a run is reported to: nowhere without `services`. run_name: None for the name of the run's directory."""

    services: tuple[str, ...] = ()
    project: str = PROJECT
    run_name: str | None = None

    @property
    def named(self) -> dict[str, str]:
        """The inputs that say it, by name."""
        return {"report_to": ",".join(self.services), "project_name": self.project if self.services else ""}


def reporting_settings(
    report_to: str | None = None, project_name: str | None = None, run_name: str | None = None
) -> ReportingSettings:
    """mlx-lm's report_to (names of services with commas between them) and project_name, checked; nothing is imported.

    Where no project is named it is WANDB_PROJECT's, or finetune-dataflow. Raises UserError for a service that is not known or
    not installed, and for a name that no project can have.
    """
    named = [each.strip().lower() for each in (report_to or "").split(",") if each.strip()]
    services = tuple(dict.fromkeys(each for each in named if each not in ("none", "null")))
    project = project_name or os.environ.get("WANDB_PROJECT") or PROJECT
    all_of(*(lambda name=each: _check_service(name) for each in services), lambda: _check_project(project))
    return ReportingSettings(services, project, run_name or None)


def _check_service(name: str) -> None:
    if name == "swanlab":
        raise UserError("report_to='swanlab' is refused: mlx-lm knows it, this dataflow reports to wandb alone.")
    if name not in SERVICES:
        raise UserError(f"report_to={name!r} is unknown.{nearest(name, SERVICES)} Expected wandb, or nothing.")
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:  # a directory wandb, which holds its runs, can be imported, too
        raise UserError("report_to='wandb' needs the package wandb: pip install 'finetune-dataflow[wandb]'.")


def _check_project(name: str) -> None:
    if len(name) > LONGEST_PROJECT or re.search(r"[/\\#?%:]", name):
        raise UserError(
            f"project_name={name[:200]!r} can be no project of Weights & Biases. Expected at most {LONGEST_PROJECT} characters, "
            "without / \\ # ? % and :. A team is named in the environment variable WANDB_ENTITY."
        )
