"""Reporting to Weights & Biases: what is told, what is kept back, and that nothing that goes wrong reaches the fit."""

import importlib.util
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from finetune_dataflow.engine import reporting as module
from finetune_dataflow.engine.event_log import EventLog
from finetune_dataflow.engine.reported import CHOICES, NOT_SENT, PLACES, TEXTS, concluded, logged, shared_config, summarised
from finetune_dataflow.engine.reporting import (
    ReportingSettings,
    reported_fit,
    reported_metrics,
    reporting,
    reporting_settings,
    run_id,
)
from finetune_dataflow.engine.reporting_service import check_reachable
from finetune_dataflow.errors import UserError

WANDB = ReportingSettings(("wandb",), "support")
MARKER = "XYZZY-the-customer-said"
CONFIG = {
    "learning_rate": 1e-4, "epochs": 2.0, "mask_prompt": True, "save_every": None, "optimizer": "adamw", "lora_keys": ["q_proj"],
    "lr_schedule": {"name": "cosine_decay", "arguments": [1e-4, -1]}, "system_prompt": f"{MARKER} 1", "input_template": "",
    "data_path": f"/home/{MARKER}/support.json", "model_id": "owner/name", "his_own": f"{MARKER} 2",
}  # fmt: skip
START = [
    {"event": "validation", "step": 0, "loss": 4.0, "best_step": 0},
    {"event": "train", "step": 10, "loss": 3.5, "learning_rate": 1e-4, "gradient_norm": 0.5, "tokens_per_second": 250.0,
     "supervised_tokens": 900, "peak_memory_bytes": 1_500_000_000},
]  # fmt: skip
REST = [
    {"event": "train", "step": 20, "loss": 3.0, "learning_rate": 5e-5, "tokens_per_second": None, "supervised_tokens": 1800},
    {"event": "validation", "step": 20, "loss": 2.5, "rougeL": 0.25, "best_step": 20},
]
END = {"event": "end", "steps": 20, "best_step": 20, "best_validation_loss": 2.5, "train_loss": 3.25, "stopped_early": False,
       "best_metric": "loss", "best_score": 2.5}  # fmt: skip
ROWS = [
    {"_step": 0, "iteration": 0, "val_loss": 4.0, "validation_loss": 4.0, "best_step": 0},
    {"_step": 10, "iteration": 10, "train_loss": 3.5, "learning_rate": 1e-4, "gradient_norm": 0.5, "tokens_per_second": 250.0,
     "supervised_tokens": 900, "peak_memory": 1.5},
    {"_step": 20, "iteration": 20, "train_loss": 3.0, "learning_rate": 5e-5, "supervised_tokens": 1800, "val_loss": 2.5,
     "validation_loss": 2.5, "rougeL": 0.25, "best_step": 20},
]  # fmt: skip
METRICS = {
    "base": {"rougeL": 0.1, "loss": 4.0}, "finetuned": {"rougeL": 0.3, "loss": 2.5},
    "difference": {"rougeL": {"mean": 0.2, "low": 0.1, "high": 0.3, "p_value": 0.001, "rows_needed": None}},
    "intervals": {"rougeL": {"base": {"low": 0.0, "high": 0.2}}}, "outcomes": {"rougeL": {"wins": 9, "ties": 2, "losses": 1}},
    "verdict": "The tuned model is better.",
    "validation": {"base": {"loss": 4.1}, "finetuned": {"loss": 2.6, "rougeL": 0.4}, "intervals": {}},
    "hold_out_rows": 12, "device": "cpu", "fit": {"train_loss": 3.25}, "evaluation": {"max_tokens": 8},
}  # fmt: skip


@pytest.fixture(autouse=True)
def nobody_signed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a working directory of the test's own, and no setting of this machine's."""
    for name in [each for each in os.environ if each.startswith("WANDB_") or each == "NETRC"]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    for each in (home, tmp_path / "work", tmp_path / "run"):
        each.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path / "work")
    return home


def test_nothing_is_reported_unless_a_service_is_named() -> None:
    assert reporting_settings(None).services == reporting_settings("", "support").services == ()
    assert reporting_settings("none").services == ()


@pytest.mark.parametrize("spelled", ["wandb", " WandB ,", "wandb,wandb"])
def test_a_service_may_be_spelled_as_in_mlx_lm(spelled: str) -> None:
    assert reporting_settings(spelled, "support", "first") == ReportingSettings(("wandb",), "support", "first")


def test_the_project_is_the_users_or_the_environments_or_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reporting_settings("wandb").project == "finetune-dataflow"
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    assert reporting_settings("wandb").project == "theirs"
    assert reporting_settings("wandb", "support").project == "support"


@pytest.mark.parametrize(
    ("service", "project", "said"),
    [
        ("swanlab", None, "report_to='swanlab' is refused: mlx-lm knows it, this dataflow reports to wandb alone."),
        ("wanbd", None, "report_to='wanbd' is unknown. Did you mean 'wandb'? Expected wandb, or nothing."),
        ("wandb", "team/support", "project_name='team/support' can be no project"),
        ("wandb", "x" * 129, "Expected at most 128 characters"),
        ("mlflow,swanlab", "a:b", "report_to='mlflow' is unknown. Expected wandb, or nothing.\nreport_to='swanlab'"),
    ],
)
def test_what_cannot_be_is_refused(service: str, project: str | None, said: str) -> None:
    with pytest.raises(UserError) as caught:
        reporting_settings(service, project)
    assert said in str(caught.value)


def test_a_missing_package_is_named_with_its_extra_also_where_a_directory_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in (None, ModuleSpec("wandb", None, is_package=True)):  # a directory wandb is a namespace package
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=found: found)
        with pytest.raises(UserError, match=r"pip install 'finetune-dataflow\[wandb\]'"):
            reporting_settings("wandb")


def test_no_text_of_the_users_is_told() -> None:
    told = shared_config({**CONFIG, "fingerprints": {"base_model": "ab12" * 16}, "metrics": ["/home/me/own.py:score", "bleu"]})
    assert told == {
        "learning_rate": 1e-4, "epochs": 2.0, "mask_prompt": True, "save_every": None, "optimizer": "adamw",
        "lora_keys": ["q_proj"], "lr_schedule": {"name": "cosine_decay", "arguments": [1e-4, -1]}, "system_prompt": NOT_SENT,
        "input_template": "", "data_path": "support.json", "model_id": "owner/name", "his_own": NOT_SENT,
        "fingerprints": {"base_model": "ab12" * 16}, "metrics": ["own.py:score", "bleu"],
    }  # fmt: skip
    assert shared_config({"his_own": {MARKER: 1}, "prompt": [MARKER], "x": object()}) == {
        "his_own": NOT_SENT, "prompt": [NOT_SENT], "x": NOT_SENT
    }  # fmt: skip


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("https://me:key@host/bucket/rows.json?sig=key#x", "rows.json"),
        ("https://me:key@host/", "host"),
        ("~/data/", "data"),
        ("support.json", "support.json"),
    ],
)
def test_of_a_place_its_last_part_is_told(place: str, told: str) -> None:
    assert shared_config({"data_path": place}) == {"data_path": told}


def test_of_every_text_that_the_graph_takes_it_is_decided_whether_it_is_told() -> None:
    from finetune_dataflow.cli.options import build_driver, graph_inputs, type_name

    inputs = {**graph_inputs(build_driver("base")), **graph_inputs(build_driver("presaved"))}
    texts = {name for name, each in inputs.items() if type_name(each.type) in ("str", "list of str", "mapping")}
    assert texts - (CHOICES | PLACES | TEXTS) == set()
    assert not (CHOICES & PLACES or CHOICES & TEXTS or PLACES & TEXTS)


def test_the_metrics_of_a_trial_keep_their_names() -> None:
    trial = {"train_loss": 1.5, "validation_loss": 2.0, "validation_perplexity": 7.4, "rouge1": 0.5}
    assert summarised(trial) == trial


def test_events_become_figures_under_mlx_lms_names() -> None:
    merged: dict[int, dict[str, float]] = {}
    for step, figures in filter(None, map(logged, [*START, *REST, END, {"event": "resume", "step": 20}, {}])):
        merged.setdefault(step, {"_step": step}).update(figures)
    assert list(merged.values()) == ROWS


def test_the_end_is_a_summary_with_the_loss_of_the_adapter_that_is_kept() -> None:
    assert concluded({**END, "loss_path": "plain", "device": "cpu"}) == {
        "steps": 20, "best_step": 20, "best_validation_loss": 2.5, "validation_loss": 2.5, "train_loss": 3.25,
        "stopped_early": False, "best_metric": "loss", "best_score": 2.5, "loss_path": "plain", "device": "cpu",
    }  # fmt: skip


def test_the_metrics_of_a_run_are_a_summary_of_numbers_and_the_verdict() -> None:
    assert summarised({**METRICS, "note": MARKER, "rows": [MARKER]}) == {
        "hold_out/base/rougeL": 0.1, "hold_out/base/loss": 4.0, "hold_out/finetuned/rougeL": 0.3, "hold_out/finetuned/loss": 2.5,
        "hold_out/difference/rougeL/mean": 0.2, "hold_out/difference/rougeL/low": 0.1, "hold_out/difference/rougeL/high": 0.3,
        "hold_out/difference/rougeL/p_value": 0.001, "validation/base/loss": 4.1, "validation/finetuned/loss": 2.6,
        "validation/finetuned/rougeL": 0.4, "validation_loss": 2.6, "rougeL": 0.4,
        "verdict": "The tuned model is better.", "hold_out_rows": 12, "device": "cpu", "train_loss": 3.25,
    }  # fmt: skip


# --- The process that speaks to the service, played by one that writes down what it is told.

PLAYED = """
import json, os, sys, time
place, how = sys.argv[1:]
open(place + ".pid", "w").write(str(os.getpid()))
if how == "hangs":
    time.sleep(600)
def say(**values):
    print(json.dumps(values), flush=True)
def write(line):
    with open(place, "a") as file:
        file.write(line)
line = sys.stdin.readline()
opening = json.loads(line)
write(line)
if not opening["offline"] and how.startswith("refuses"):
    say(failed="permission\\x1b[2J denied")
    sys.exit(1)
if how == "refuses all" and opening["offline"]:
    sys.exit("no space left")
url = None if opening["offline"] else "https://w/1"
say(ready={"offline": opening["offline"], "directory": "/r/wandb/one", "url": url})
for number, line in enumerate(sys.stdin):
    write(line)
    if not opening["offline"] and how == "dies" and number == 1:
        os._exit(9)
    if '"end"' in line:
        if how == "notes":
            say(noted="Fatal error while uploading data.")
            say(noted="And another.")
        say(finished=how != "slow")
        break
"""


@dataclass(frozen=True)
class Played:
    """What the process was told, of each that was started."""

    place: Path

    def told(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.place.read_text().splitlines()]

    def ends(self) -> None:
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int(Path(f"{self.place}.pid").read_text()), signal.SIGKILL)


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Played]]:
    """Makes the service one that behaves in a certain way."""
    script = tmp_path / "played.py"
    script.write_text(PLAYED)
    made = Played(tmp_path / "told.jsonl")

    def make(how: str) -> Played:
        monkeypatch.setattr(module, "COMMAND", (sys.executable, "-S", str(script), str(made.place), how))
        return made

    yield make
    made.ends()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def report(directory: Path, events: Sequence[dict[str, Any]], settings: ReportingSettings = WANDB, **options: Any) -> None:
    with reporting(settings, directory, CONFIG, "support-1a2b", **options) as reporter:
        for event in events:
            reporter(event)


def test_off_and_disabled_start_nothing_and_write_nothing(
    tmp_path: Path, played: Callable[[str], Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = played("takes")
    report(tmp_path / "run", [*START, END], ReportingSettings())
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with reporting(WANDB, tmp_path / "run", CONFIG, "x") as reporter:
        reporter(START[0])
        reporter.summary(METRICS)
    assert not any((tmp_path / "run").iterdir()) and not service.place.exists()


def test_a_run_is_told_from_its_settings_to_its_end(tmp_path: Path, played: Callable[[str], Played]) -> None:
    service = played("takes")
    report(tmp_path / "run", [*START, {**END, "event": "?"}], group="sweep", tags=["lora", "", "x" * 70], job_type="sweep-trial")
    opening, *lines, last = service.told()
    identity = (tmp_path / "run" / "wandb-run-id").read_text().strip()
    assert opening["settings"] == {
        "project": "support", "run_name": "support-1a2b", "run_group": "sweep", "run_tags": ["lora", "x" * 64],
        "run_job_type": "sweep-trial", "run_id": identity, "root_dir": str(tmp_path / "run"), "init_timeout": 10.0,
        "finish_timeout": 5.0,
    }  # fmt: skip
    assert opening["config"]["learning_rate"] == 1e-4 and opening["offline"] is False
    assert [each["step"] for each in lines] == [0, 10] and last == {"end": 0}


@pytest.mark.parametrize(("raised", "exit_code"), [(ValueError, 1), (KeyboardInterrupt, 255)])
def test_a_fit_that_fails_or_is_interrupted_ends_its_run_so(
    raised: type[BaseException], exit_code: int, tmp_path: Path, played: Callable[[str], Played]
) -> None:
    service = played("takes")
    with pytest.raises(raised), reporting(WANDB, tmp_path / "run", CONFIG, "x") as reporter:
        reporter(START[0])
        raise raised
    assert service.told()[-1] == {"end": exit_code}


def test_the_name_is_the_users_then_the_environments(
    tmp_path: Path, played: Callable[[str], Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = played("takes")
    monkeypatch.setenv("WANDB_NAME", "theirs")
    report(tmp_path / "run", [])
    report(tmp_path / "run", [], ReportingSettings(("wandb",), "support", "mine"))
    assert [each["settings"]["run_name"] for each in service.told() if "settings" in each] == ["theirs", "mine"]


def test_a_fit_that_goes_on_tells_what_was_recorded_before_it(tmp_path: Path, played: Callable[[str], Played]) -> None:
    service = played("takes")
    history = [*START, {"event": "resume", "step": 10}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in history) + '{"half')
    report(tmp_path / "run", [history[-1], *REST])
    assert [each["step"] for each in service.told() if "step" in each] == [0, 10, 20, 20]


def test_a_summary_by_itself_comes_after_the_whole_history(tmp_path: Path, played: Callable[[str], Played]) -> None:
    service = played("takes")
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [*START, *REST, END]))
    with reporting(WANDB, tmp_path / "run", CONFIG, "x") as reporter:
        reporter.summary(METRICS)
        reporter.summary({"train_loss": 1.0})
    told = service.told()[1:]
    assert [each.get("step") for each in told] == [0, 10, 20, 20, None, None, None, None]
    assert [[*each] for each in told[4:]] == [["summary"], ["summary"], ["summary"], ["end"]]


def test_a_fit_and_its_metrics_are_one_run_under_the_name_of_their_directory(
    tmp_path: Path, played: Callable[[str], Played]
) -> None:
    service, run = played("takes"), tmp_path / "run"
    with reported_fit(WANDB, run, CONFIG), EventLog(run / "metrics.jsonl") as log:
        for event in [*START, END]:
            log.write(**event)
    assert reported_metrics(WANDB, run, CONFIG, METRICS) == run / "wandb-run-id"
    told = service.told()
    second = [each.get("offline") for each in told].index(False, 1)
    assert told[0]["settings"] == told[second]["settings"] and told[0]["settings"]["run_name"] == "run"
    assert told[1 : second - 1] == told[second + 1 : -2]  # the history, which the second finds in metrics.jsonl
    assert told[-2] == {"summary": summarised(METRICS)}
    assert reported_metrics(ReportingSettings(), tmp_path / "home", CONFIG, METRICS) is None


def test_what_is_asked_for_is_named_as_the_inputs_that_ask_for_it() -> None:
    assert WANDB.named == {"report_to": "wandb", "project_name": "support"}
    assert ReportingSettings().named == {"report_to": "", "project_name": ""}


def test_a_fit_that_begins_again_tells_nothing_of_the_one_before(tmp_path: Path, played: Callable[[str], Played]) -> None:
    service = played("takes")
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(REST[0]) + "\n")
    report(tmp_path / "run", [*START, END])
    assert [each["step"] for each in service.told() if "step" in each] == [0, 10]


@pytest.mark.parametrize("how", ["refuses", "dies"])
def test_where_the_service_fails_everything_is_told_again_to_one_that_writes_files(
    how: str, tmp_path: Path, played: Callable[[str], Played], caplog: pytest.LogCaptureFixture
) -> None:
    service = played(how)
    report(tmp_path / "run", [*START, *REST, END])
    told = service.told()
    offline = told[[each.get("offline") for each in told].index(True) :]
    assert offline[0]["settings"] == told[0]["settings"]
    assert [each.get("step", next(iter(each))) for each in offline[1:]] == [0, 10, 20, 20, "summary", "end"]
    assert len(warnings(caplog)) == 1
    assert warnings(caplog)[0].startswith("Weights & Biases cannot be used: ")
    assert warnings(caplog)[0].endswith("The run is recorded in files instead. To send them: wandb sync /r/wandb/one")


def test_a_reason_is_safe_to_print(tmp_path: Path, played: Callable[[str], Played], caplog: pytest.LogCaptureFixture) -> None:
    played("refuses")
    report(tmp_path / "run", START)
    assert r"cannot be used: permission\x1b[2J denied. The run" in warnings(caplog)[0]


def test_where_no_file_can_be_written_either_one_warning_says_where_the_figures_are(
    tmp_path: Path, played: Callable[[str], Played], caplog: pytest.LogCaptureFixture
) -> None:
    played("refuses all")
    report(tmp_path / "run", [*START, *REST])
    assert len(warnings(caplog)) == 1 and "metrics.jsonl" in warnings(caplog)[0] and "reporting.log" in warnings(caplog)[0]


def test_what_cannot_be_started_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "COMMAND", (str(tmp_path / "nothing"),))
    report(tmp_path / "run", [*START, *REST, END])
    assert len(warnings(caplog)) == 1 and "No such file or directory. No figure is lost" in warnings(caplog)[0]


def test_a_directory_that_takes_no_file_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    report(tmp_path / "file", START)
    assert len(warnings(caplog)) == 1 and "wandb-run-id cannot be written" in warnings(caplog)[0]


def test_one_that_stands_still_holds_nobody_up(
    tmp_path: Path, played: Callable[[str], Played], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    played("hangs")
    for name in ("STARTING_SECONDS", "OPENING_SECONDS", "SENDING_SECONDS"):
        monkeypatch.setattr(module, name, 0.1)
    report(tmp_path / "run", [{**START[1], "step": step} for step in range(20_000)])  # megabytes, more than a pipe takes
    assert len(warnings(caplog)) == 1 and "goes on by itself" in warnings(caplog)[0]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("slow", "has not taken everything in time. To send the rest: wandb sync --include-online /r/wandb/one"),
        ("notes", "Fatal error while uploading data. To send everything later: wandb sync --include-online /r/wandb/one"),
    ],
)
def test_what_was_not_sent_is_said_once_with_what_sends_it(
    how: str, said: str, tmp_path: Path, played: Callable[[str], Played], caplog: pytest.LogCaptureFixture
) -> None:
    played(how)
    report(tmp_path / "run", START)
    assert len(warnings(caplog)) == 1 and warnings(caplog)[0].endswith(said)


def test_the_link_of_the_run_is_told(tmp_path: Path, played: Callable[[str], Played], caplog: pytest.LogCaptureFixture) -> None:
    played("takes")
    with caplog.at_level(logging.INFO):
        report(tmp_path / "run", START)
    assert [each.getMessage() for each in caplog.records] == ["Weights & Biases: https://w/1"]


def test_a_directory_is_one_run_and_under_an_agent_the_agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_id(tmp_path)
    assert len(first) == 8 and run_id(tmp_path) == first
    (tmp_path / "wandb-run-id").write_text("../../x\n")  # damaged
    assert len(run_id(tmp_path)) == 8
    monkeypatch.setenv("WANDB_RUN_ID", "theirs")
    assert run_id(tmp_path) != "theirs"
    assert run_id(tmp_path / "home") == "theirs"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    assert run_id(tmp_path) == "theirs" == (tmp_path / "wandb-run-id").read_text().strip()
    assert run_id(tmp_path / "work", alone=False) != "theirs"


# --- The real thing, offline.


def records(directory: Path) -> list[Any]:
    """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB, behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made at import

    (file,) = directory.glob("*.wandb")
    content, place, whole, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(Record.FromString(whole))
            whole = b""
    return found


def items(values: Any) -> dict[str, Any]:
    return {".".join(each.nested_key) or each.key: json.loads(each.value_json) for each in values}


def history(directory: Path) -> list[dict[str, Any]]:
    rows = [items(each.history.item) for each in records(directory) if each.HasField("history")]
    return [{name: value for name, value in row.items() if name not in ("_runtime", "_timestamp")} for row in rows]


def summary(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for each in records(directory):
        found |= items(each.summary.update)
    return found


def the_run(directory: Path) -> Any:
    return next(each.run for each in records(directory) if each.HasField("run"))


def exit_codes(directory: Path) -> list[int]:
    """The exit code, as soon as there is one."""
    return [each.exit.exit_code for each in records(directory) if each.HasField("exit")] if [*directory.glob("*.wandb")] else []


def recorded(run_directory: Path) -> list[Path]:
    return sorted((run_directory / "wandb").glob("offline-run-*"))


def texts(directory: Path) -> list[tuple[Path, bytes]]:
    return [(each, each.read_bytes()) for each in directory.rglob("*") if each.is_file() and not each.is_symlink()]


def test_offline_everything_is_recorded_in_the_run_directory_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, nobody_signed_in: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    with caplog.at_level(logging.INFO), reporting(WANDB, run, CONFIG, "support-1a2b", group="g", tags=("t",)) as reporter:
        for event in [*START, *REST, END]:
            reporter(event)
        reporter.summary(METRICS)
    (made,) = recorded(run)
    assert history(made) == ROWS
    expected = {**concluded(END), **summarised(METRICS)}
    assert {name: value for name, value in summary(made).items() if name in expected} == expected
    told = the_run(made)
    assert (told.project, told.display_name, told.run_group, [*told.tags], told.job_type) == (
        "support", "support-1a2b", "g", ["t"], "train"
    )  # fmt: skip
    assert told.run_id == (run / "wandb-run-id").read_text().strip() and not told.resume
    config = items(told.config.update)
    assert {name: value for name, value in config.items() if name != "_wandb"} == shared_config(CONFIG)
    assert exit_codes(made) == [0]
    assert [each.getMessage() for each in caplog.records] == [
        f"Recorded for Weights & Biases in files. To send them: wandb sync {made}"
    ]
    assert texts(nobody_signed_in) == [] and texts(tmp_path / "work") == []
    for file, content in texts(run):
        assert MARKER.encode() not in content, file
    sent = b"".join(content for file, content in texts(made) if file.suffix != ".log")
    for kept_back in (socket.gethostname(), str(Path.cwd()), sys.executable, str(Path(module.__file__).parent)):
        assert kept_back.encode() not in sent


def children(process: int) -> list[int]:
    found = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,comm="], capture_output=True, text=True, check=True).stdout
    listed = [line.split() for line in found.splitlines()]
    return [int(each) for each, parent, command, *_ in listed if int(parent) == process and command != "ps"]


def waited_for(holds: Callable[[], Any]) -> Any:
    until = time.monotonic() + 60
    while not (found := holds()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


def test_a_service_that_dies_in_the_middle_is_one_warning_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, before = tmp_path / "run", {*children(os.getpid())}
    with reporting(WANDB, run, CONFIG, "x") as reporter:
        for event in START:
            reporter(event)
        waited_for(lambda: [each for each in recorded(run) if list(each.glob("*.wandb"))])
        (ours,) = {*children(os.getpid())} - before
        (service,) = children(ours)
        os.kill(service, signal.SIGKILL)
        for event in [*REST, END]:
            reporter(event)
    whole = recorded(run)[-1]
    assert history(whole) == ROWS and exit_codes(whole) == [0]
    assert len(warnings(caplog)) == 1 and warnings(caplog)[0].endswith(f"wandb sync {whole}")


KILLED = """
import os, pathlib, signal, sys
from finetune_dataflow.engine.reporting import ReportingSettings, reporting
with reporting(ReportingSettings(("wandb",), "support"), pathlib.Path(sys.argv[1]), {}, "x") as reporter:
    reporter({"event": "validation", "step": 0, "loss": 4.0, "best_step": 0})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_fit_that_is_killed_has_failed_and_goes_on_as_the_same_run_whose_last_files_are_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, environment = tmp_path / "run", {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", KILLED, str(run)], env=environment).returncode == -signal.SIGKILL
    first = waited_for(lambda: [each for each in recorded(run) if exit_codes(each)])[0]
    assert exit_codes(first) == [1] and history(first) == ROWS[:1]
    kept = [*START, {"event": "resume", "step": 10}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in kept))
    report(run, [kept[-1], *REST, END])
    second = recorded(run)[1]
    assert the_run(first).run_id == the_run(second).run_id == (run / "wandb-run-id").read_text().strip()
    assert exit_codes(second) == [0] and history(second) == ROWS


# --- The real thing, with a server of its own.


class Server(ThreadingHTTPServer):
    """Answers like the service, which has two rows of the run; `refusal` is what it says to a run that is to be made."""

    def __init__(self, refusal: tuple[int, str] | None) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.refusal = refusal
        self.heard: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, body: str) -> tuple[int, dict[str, Any]]:
        asked = json.loads(body) if body else {}
        operation, variables = asked.get("operationName"), asked.get("variables", {})
        if operation == "UpsertBucket" and self.refusal is not None:
            return self.refusal[0], {"errors": [{"message": self.refusal[1]}]}
        project = {"id": "1", "name": "support", "entity": {"id": "2", "name": "me"}}
        bucket = {"id": "3", "name": variables.get("name"), "displayName": "x", "config": "{}", "project": project,
                  "historyLineCount": 2, "eventsLineCount": 0, "logLineCount": 0, "summaryMetrics": "{}", "eventsTail": "[]",
                  "historyTail": json.dumps([json.dumps({"_step": 10})]), "wandbConfig": '{"t": {}}', "tags": []}  # fmt: skip
        uploads = [{"name": each, "uploadUrl": f"{self.url}/{each}"} for each in variables.get("files", [])]
        answers = {
            "RunResumeStatus": {"model": {**project, "bucket": None if self.refusal else bucket}},
            "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": False}},
            "CreateRunFiles": {"createRunFiles": {"runID": "3", "uploadHeaders": [], "files": uploads}},
        }
        return 200, {"data": answers.get(str(operation), {})}


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        self.server.heard.append((self.path, body))
        status, answer = self.server.answer(body) if self.path == "/graphql" else (200, {})
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """Starts a server that the run is to be reported to, with a key that looks like one."""
    started: list[Server] = []

    def start(refusal: tuple[int, str] | None = None) -> Server:
        made = Server(refusal)
        started.append(made)
        threading.Thread(target=made.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", made.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        return made

    yield start
    for each in started:
        each.shutdown()
        each.server_close()


def test_online_no_step_is_sent_twice_and_nothing_but_figures_and_settings(
    tmp_path: Path, server: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    heard, run = server().heard, tmp_path / "run"
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in START))
    report(run, [{"event": "resume", "step": 10}, *REST, END])
    sent: dict[str, Any] = {}
    for path, body in heard:
        if path.endswith("file_stream"):
            sent |= json.loads(body)["files"] | json.loads(body)
    assert sent["wandb-history.jsonl"]["offset"] == 2
    (row,) = map(json.loads, sent["wandb-history.jsonl"]["content"])
    assert {name: value for name, value in row.items() if name not in ("_runtime", "_timestamp")} == ROWS[2]
    assert sent["complete"] is True and sent["exitcode"] == 0
    figures = json.loads(sent["wandb-summary.json"]["content"][-1])
    assert (figures["validation_loss"], figures["train_loss"], figures["best_step"]) == (2.5, 3.25, 20)
    assert {path.rpartition("/")[2] for path, _ in heard} == {"graphql", "file_stream", "wandb-summary.json", "config.yaml"}
    for kept_back in (MARKER, socket.gethostname(), str(tmp_path), str(Path(module.__file__).parent)):
        assert not any(kept_back in body for _, body in heard), kept_back
    assert warnings(caplog) == []


def test_a_project_that_is_gone_is_one_warning_and_nothing_is_lost(
    tmp_path: Path, server: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    heard = server((404, "project support not found")).heard
    report(tmp_path / "run", [*START, *REST, END])
    (made,) = recorded(tmp_path / "run")
    assert history(made) == ROWS
    assert len(warnings(caplog)) == 1
    assert "project support not found" in warnings(caplog)[0] and warnings(caplog)[0].endswith(f"wandb sync {made}")
    assert any("upsertBucket" in body for _, body in heard)
    assert not any(MARKER in body or socket.gethostname() in body for _, body in heard)


def test_who_is_not_signed_in_is_not_asked_and_told_how_to(
    tmp_path: Path, server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server()
    monkeypatch.delenv("WANDB_API_KEY")
    report(tmp_path / "run", [*START, *REST])
    (made,) = recorded(tmp_path / "run")
    assert history(made) == ROWS
    assert len(warnings(caplog)) == 1 and "wandb login" in warnings(caplog)[0]


def test_where_nobody_answers_it_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match=r"127\.0\.0\.1 cannot be reached: Connection refused"):
            check_reachable(url, proxied=False)
        check_reachable(url, proxied=True)
        taken.listen()
        check_reachable(url, proxied=False)
