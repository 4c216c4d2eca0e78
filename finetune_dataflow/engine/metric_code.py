"""The code of a user's own metrics, as fingerprints: another code gives other scores."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

from finetune_dataflow.engine.files import user_path
from finetune_dataflow.engine.path_contents import path_fingerprint
from finetune_dataflow.engine.settings import Scoring


def of_files(names: Sequence[str]) -> tuple[str, ...]:
    """A fingerprint for each metric named by a file (`FILE.py:function`, a script or its directory); "" for one of the hub."""
    found = []
    for name in names:
        file = name.rpartition(":")[0] if name.rpartition(":")[0].endswith(".py") else name
        path = user_path(file)
        found.append(path_fingerprint(path) if path.exists() else "")
    return tuple(found)


def of_functions(functions: Mapping[str, Scoring]) -> dict[str, str]:
    """By name, a fingerprint of the file that each function stands in; "" where it stands in none."""
    found = {}
    for name, function in functions.items():
        source = inspect.getsourcefile(function) if inspect.isfunction(function) else None
        found[name] = path_fingerprint(user_path(source)) if source else ""
    return found
