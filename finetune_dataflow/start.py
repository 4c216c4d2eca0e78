"""The choice between the two graphs: `start="base"` fits, then evaluates; `start="presaved"` evaluates an adapter."""

from __future__ import annotations

from typing import Any

from hamilton.function_modifiers import config

from finetune_dataflow.errors import UserError, nearest

STARTS = ("base", "presaved")


def _start_is_known(configuration: dict[str, Any]) -> bool:
    """True, or a UserError that names the two graphs: left alone, Hamilton would turn nodes into missing inputs."""
    start = configuration.get("start")
    if start in STARTS:
        return True
    found = "is missing." if start is None else f"is {start!r}, which is unknown.{nearest(str(start), STARTS)}"
    raise UserError(
        f'The config "start" {found} Expected "base" (fit an adapter, then evaluate it) '
        'or "presaved" (evaluate the adapter in adapter_path).'
    )


# On a node that both graphs have, so that building any graph checks `start`.
checked_start = config(_start_is_known, config_used=["start"])
