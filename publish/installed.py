"""The fixed call and the hub's calls from an environment that has the wheel and nothing of a checkout.

`python -I installed.py call WORK` runs the fixed call under both configs in the directory WORK, which holds rows.json, and
leaves what it gave in WORK/package.json. `python -I installed.py hub WORK HUB USER NAME` gets the dataflow NAME of USER from
HUB, a directory laid out as Hamilton lays out what it has pulled, with the network switched off, and runs the same through it:
the results must be those of the package. Problems are printed, and the exit code is then 1.
"""

from __future__ import annotations

import importlib.util
import json
import math
import socket
import sys
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from hamilton import dataflows, driver

import finetune_dataflow

OUTPUTS = [
    "save_best_models", "hold_out_set_predictions",
    "training_and_validation_set_metrics", "finetuned_model_on_validation_set",
]  # fmt: skip
SCORES = ["validation_loss", "validation_perplexity", "rouge1", "rouge2", "rougeL", "rougeLsum"]
DATA = {"data_path": "rows.json", "input_text_key": "question", "output_text_key": "reply"}
# Small, so that it takes a minute. Replies are not taken from the store, where those of another run would do.
SMALL = {"max_tokens": 12, "reuse_replies": False}
SMALL_FIT = {**SMALL, "iters": 6, "num_layers": 4}
VERSION = "local"


def fixed_call(module: ModuleType, start: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """The call of the README."""
    dr = driver.Builder().with_config({"start": start}).with_modules(module).build()
    return dict(dr.execute(OUTPUTS, inputs=inputs))


def problems(start: str, result: dict[str, Any], rows: list[dict[str, str]]) -> list[str]:
    """What the results of the fixed call lack of what is promised of them, a line each."""
    paths, predictions = result["save_best_models"], result["hold_out_set_predictions"]
    metrics, replies = result["training_and_validation_set_metrics"], result["finetuned_model_on_validation_set"]
    promised = ["train_loss", *SCORES] if start == "base" else SCORES
    inputs = {row[DATA["input_text_key"]] for row in rows}
    references = {row[DATA["output_text_key"]] for row in rows}
    checks = {
        "the results are those that were asked for": list(result) == OUTPUTS,
        "save_best_models begins with adapter, a directory, and names config": (
            next(iter(paths)) == "adapter" and paths["adapter"].is_dir() and "config" in paths
        ),
        "every path of save_best_models is there": all(isinstance(each, Path) and each.exists() for each in paths.values()),
        "hold_out_set_predictions is a list of (input text as in the file, prediction)": bool(predictions)
        and all(text in inputs and isinstance(said, str) for text, said in predictions),
        f"training_and_validation_set_metrics is {', '.join(promised)}, all finite": list(metrics) == promised
        and all(isinstance(value, float) and math.isfinite(value) for value in metrics.values()),
        "finetuned_model_on_validation_set is as many validation_predictions as validation_references, of the file": (
            list(replies) == ["validation_predictions", "validation_references"]
            and 0 < len(replies["validation_predictions"]) == len(replies["validation_references"])
            and {*replies["validation_references"]} <= references
        ),
    }
    return [f"start={start}: not true: {said}" for said, holds in checks.items() if not holds]


def comparable(result: dict[str, Any]) -> dict[str, Any]:
    """The results but for the places of files, as JSON keeps them."""
    return dict(json.loads(json.dumps({name: result[name] for name in OUTPUTS[1:]})))


def both_starts(module: ModuleType, work: Path, out: str) -> tuple[dict[str, Any], list[str]]:
    """Fit and evaluate into WORK/out, then evaluate that adapter alone: what each gave, and what is wrong with it."""
    rows = json.loads((work / DATA["data_path"]).read_text(encoding="utf-8"))
    data = {**DATA, "data_path": str(work / DATA["data_path"])}
    base = fixed_call(module, "base", {**data, **SMALL_FIT, "output_dir": str(work / out)})
    adapter = base["save_best_models"]["adapter"]
    before = _contents(work / out)
    presaved = fixed_call(module, "presaved", {**data, **SMALL, "adapter_path": str(adapter)})
    found = [*problems("base", base, rows), *problems("presaved", presaved, rows)]
    if _contents(work / out) != before:
        found.append("start=presaved: something was written to the run directory of the adapter")
    for name in ("hold_out_set_predictions", "finetuned_model_on_validation_set"):
        if presaved[name] != base[name]:
            found.append(f"start=presaved: {name} is not that of the run which made the adapter")
    return {"base": comparable(base), "presaved": comparable(presaved)}, found


def _contents(directory: Path) -> dict[str, int]:
    return {str(each): each.stat().st_mtime_ns for each in directory.rglob("*")}


def point_hub_at(directory: Path) -> None:
    """Let Hamilton keep what it pulls in `directory` instead of the user's home."""
    user, official = "/user/{user}/{dataflow}", "/dagworks/{dataflow}"
    dataflows.DATAFLOW_FOLDER = str(directory)
    dataflows.USER_PATH = f"{directory}/{dataflows.COMMON_PATH}{user}"
    dataflows.OFFICIAL_PATH = f"{directory}/{dataflows.COMMON_PATH}{official}"


def place_of(hub: Path, user: str) -> Path:
    """Where a user's folder is kept in the hub's directory."""
    return hub / dataflows.COMMON_PATH.format(commit_ish=VERSION) / "user" / user


def hub_problems(module: ModuleType, user: str, name: str, work: Path) -> list[str]:
    """What Hamilton's own functions find wrong with a dataflow that `import_module` gave, and with a copy of it."""
    from graphs import STARTS, differences

    told = dataflows.inspect(name, user, VERSION)
    looked = dataflows.inspect_module(module)
    nodes, inputs = ({each for each, _ in found} for found in (looked.nodes, looked.possible_inputs))
    requirement = f"finetune-dataflow>={finetune_dataflow.__version__},<={finetune_dataflow.__version__}"
    checks = {
        "inspect finds the requirement": told.python_dependencies == [requirement],
        "inspect finds the two configurations": [json.loads(each) for each in told.configurations]
        == [{"start": start} for start in STARTS],
        "inspect names the user": told.user == f"https://github.com/{user}",
        "inspect_module finds the outputs": {*OUTPUTS} <= nodes,
        "inspect_module finds the inputs": {*DATA, "output_dir"} <= inputs,
        "list finds the dataflow": (VERSION, user, name) in dataflows.list(version=VERSION, user=user),
        "are_py_dependencies_satisfied": dataflows.are_py_dependencies_satisfied(name, user, VERSION),
    }
    found = [f"not true: {said}" for said, holds in checks.items() if not holds]
    dataflows.copy(module, str(work / "copied"), renamed_module="my_own")
    copied = loaded("my_own", work / "copied" / "my_own" / "__init__.py")
    for each, what in ((module, "the dataflow"), (copied, "a copy under another name")):
        found += [f"{what}: {line}" for start in STARTS for line in differences(each, start)]
    return found


def loaded(name: str, path: Path) -> ModuleType:
    """The module in a file, under a name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def switch_network_off() -> None:
    """Let whatever asks the network fail by the name of what it asked for."""

    def refuse(*address: Any, **others: Any) -> NoReturn:
        raise AssertionError(f"the network was asked for {address}")

    urllib.request.urlopen = refuse
    socket.socket.connect = refuse  # type: ignore[method-assign]  # on purpose


def main(words: list[str]) -> int:
    """Run one of the two, print what is wrong, and return 1 where something is."""
    command, work = words[0], Path(words[1])
    print(f"  finetune_dataflow {finetune_dataflow.__version__} from {Path(finetune_dataflow.__file__).parent}")
    if command == "call":
        results, found = both_starts(finetune_dataflow, work, "package")
        (work / "package.json").write_text(json.dumps(results), encoding="utf-8")
    else:
        hub, user, name = Path(words[2]), words[3], words[4]
        sys.path.append(str(Path(__file__).parent))
        switch_network_off()
        point_hub_at(hub)
        module = dataflows.import_module(name, user, version=VERSION)
        found = hub_problems(module, user, name, work)
        results, wrong = both_starts(module, work, "flat")
        found += wrong
        if results != json.loads((work / "package.json").read_text(encoding="utf-8")):
            found.append("the flat module's results are not those of the package")
    for each in found:
        print(f"  {each}")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
