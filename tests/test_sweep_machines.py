"""What a sweep over machines rests on: storages by URL, claims with a heartbeat, artefacts, and the probe of each machine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from finetune_dataflow.cli import main
from finetune_dataflow.cli.sweep import sweep_options
from finetune_dataflow.errors import UserError
from finetune_dataflow.sweeps import claims, probe, probe_task, storage
from finetune_dataflow.sweeps.agent import AgentJob
from finetune_dataflow.sweeps.artifacts import Artifacts
from finetune_dataflow.sweeps.claims import CLAIM, ClaimLost, SharedDesk, StopAsked
from finetune_dataflow.sweeps.clusters import Cluster, check_executor

optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://bob:secret@host:5432/db", "postgresql://bob:***@host:5432/db"),
        ("mysql+pymysql://bob:s3/c@r:t@host/db", "mysql+pymysql://bob:***@host/db"),
        ("postgresql://host/db?user=bob&password=secret&x=1", "postgresql://host/db?user=bob&password=***&x=1"),
        ("sqlite:////share/study.db", "sqlite:////share/study.db"),
        ("s3://key:secret@bucket/sweeps", "s3://key:***@bucket/sweeps"),
    ],
)
def test_a_password_is_shown_nowhere(url: str, shown: str) -> None:
    assert storage.redacted(url) == shown
    assert storage.redacted(f"at {url} it failed") == f"at {shown} it failed"


def test_what_a_library_says_of_a_password_is_blotted_out_too() -> None:
    url = "postgresql://bob:se%40cret@host/db"
    said = storage.without_secrets("no user bob with se@cret (se%40cret)", url)
    assert said == "no user bob with *** (***)"


def test_the_job_of_an_agent_says_no_url() -> None:
    job = AgentJob("s.yaml", "out", (), {}, storage="postgresql://bob:secret@h/d", artifacts="s3://k:hidden@b/x")
    assert "secret" not in repr(job) and "hidden" not in repr(job)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "--storage 'nonsense' is refused"),
        ("postgre://bob:secret@h/d", r"'postgre://bob:\*\*\*@h/d' is refused"),
        ("oracle://bob:secret@h/d", r"needs a package that is not installed: pip install oracledb"),
        ("journal://relative.log", "named from the root"),
        ("journal:////no/such/directory/x.log", "the directory //?no/such/directory does not exist"),
        ("sqlite:////no/such/directory/x.db", "cannot be used .*unable to open database file"),
    ],
)
def test_a_storage_that_cannot_be_used_is_told_with_the_reason(url: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        storage.check_storage(url)
    assert "secret" not in str(refused.value)


def test_a_storage_that_is_silent_is_given_up() -> None:
    never = threading.Event()
    with pytest.raises(UserError, match=r"The study's storage x did not answer within 0\.01 seconds\."):
        storage.answered(never.wait, "The study's storage x", seconds=0.01)
    never.set()


@pytest.mark.parametrize("scheme", ["sqlite", "journal"])
def test_a_study_is_kept_at_a_url(scheme: str, tmp_path: Path) -> None:
    url = f"{scheme}:///{tmp_path}/kept" if scheme == "sqlite" else f"{scheme}://{tmp_path}/kept"
    storage.check_storage(url)
    optuna.create_study(storage=storage.storage(url), study_name="one")
    assert [each.study_name for each in storage.storage(url).get_all_studies()] == ["one"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--executor", "rai"], "--executor 'rai' is unknown. Did you mean 'ray'?"),
        (["--executor-address", "host:1"], "--executor-address is of a cluster. Give --executor ray or --executor dask"),
    ],
)
def test_an_executor_that_there_is_not_is_told(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "x.yaml", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_cluster_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_dataflow.sweeps.clusters.find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape("--executor ray needs Ray: pip install 'finetune-dataflow[ray]'.")):
        check_executor("ray", "")


def test_options_of_machines_are_the_sweeps_own() -> None:
    found = sweep_options(["s.yaml", "--executor=dask", "--executor-address", "h:1", "--artifacts", "s3://b/x", "--epochs", "2"])
    assert (found.executor, found.address, found.artifacts, found.jobs) == ("dask", "h:1", "s3://b/x", None)
    assert found.arguments == ("--epochs", "2")


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study(study_name="sweep", storage=optuna.storages.InMemoryStorage())


def claimed_elsewhere(study: optuna.Study) -> optuna.Trial:
    """A trial of an agent of another machine, whose heart has beaten three times."""
    trial = study.ask()
    trial.set_user_attr(CLAIM, {"agent": "other", "host": "far", "machine": "far away", "pid": 1, "started": "0"})
    trial.set_user_attr("beat:other", 3)
    return trial


def test_a_trial_of_another_machine_is_free_when_its_heart_has_stood_still(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    trial, desk = claimed_elsewhere(study), SharedDesk(study)
    assert not desk.free(study.trials[0])
    now[0] += claims.LEASE_SECONDS - 1
    assert not desk.free(study.trials[0])
    trial.set_user_attr("beat:other", 4)
    now[0] += claims.LEASE_SECONDS - 1
    assert not desk.free(study.trials[0])
    now[0] += claims.LEASE_SECONDS + 1
    assert desk.free(study.trials[0])


def test_a_trial_of_a_process_of_this_machine_is_free_as_soon_as_that_is_gone(study: optuna.Study) -> None:
    trial, desk = study.ask(), SharedDesk(study)
    desk.take(trial)
    assert not SharedDesk(study).free(study.trials[0])
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    trial.set_user_attr(CLAIM, {**study.trials[0].user_attrs[CLAIM], "pid": ended.pid})
    assert SharedDesk(study).free(study.trials[0])


def test_a_claim_is_kept_for_the_block_and_given_back(study: optuna.Study) -> None:
    trial, desk = study.ask(), SharedDesk(study)
    desk.take(trial)
    with desk.holding(trial):
        assert study.trials[0].user_attrs[CLAIM]["agent"] == desk.agent
    assert SharedDesk(study).free(study.trials[0])


def test_an_agent_whose_trial_was_taken_stops(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.01)
    trial, desk = study.ask(), SharedDesk(study)
    desk.take(trial)
    with pytest.raises(ClaimLost, match="Trial 0 was taken over by"), desk.holding(trial):
        SharedDesk(study).take(trial)
        threading.Event().wait(10)
    assert study.trials[0].user_attrs[CLAIM]["agent"] != desk.agent


def test_an_agent_whose_sweep_was_stopped_stops_and_gives_its_trial_back(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.01)
    study.set_user_attr("session:now", {"beat": 1, "stopped": False})
    trial, desk = study.ask(), SharedDesk(study, "now", watched=True)
    desk.take(trial)
    with pytest.raises(StopAsked, match="The sweep was stopped"), desk.holding(trial):
        study.set_user_attr("session:now", {"beat": 2, "stopped": True})
        threading.Event().wait(10)
    assert study.trials[0].user_attrs[CLAIM] == {}


def test_an_agent_whose_sweep_is_gone_stops(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(claims, "LEASE_SECONDS", 0.05)
    study.set_user_attr("session:now", {"beat": 1, "stopped": False})
    trial, desk = study.ask(), SharedDesk(study, "now", watched=True)
    desk.take(trial)
    with pytest.raises(StopAsked, match="The sweep that this agent works for has been silent"), desk.holding(trial):
        threading.Event().wait(10)


def test_turns_are_taken_one_after_another_and_a_dead_one_is_passed_over(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, most = [0], [0]

    def turns() -> None:
        for _ in range(5):
            with SharedDesk(study).turn():
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    monkeypatch.setattr(claims, "ASKING_SECONDS", 0.001)
    threads = [threading.Thread(target=turns) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert most == [1]
    tickets = optuna.load_study(study_name="sweep-turns", storage=study._storage)
    tickets.ask()  # of one who will never tell it
    monkeypatch.setattr(claims, "TURN_SECONDS", 0.0)
    with SharedDesk(study).turn():
        assert tickets.trials[15].state == TrialState.FAIL


@pytest.fixture
def trial_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "0"
    (directory / "adapters").mkdir(parents=True)
    (directory / "checkpoints").mkdir()
    (directory / "trial.json").write_text("{}")
    (directory / "adapters" / "adapters.safetensors").write_bytes(b"weights")
    (directory / "checkpoints" / "large").write_bytes(b"x")
    return directory


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_a_trial_is_put_and_fetched_with_what_later_steps_need(scheme: str, trial_directory: Path, tmp_path: Path) -> None:
    there = Artifacts(f"{scheme}://{tmp_path}/artefacts", "sweep")
    assert not there.fetch(0, tmp_path / "small", everything=False)
    there.put(0, trial_directory)
    assert there.fetch(0, tmp_path / "small", everything=False)
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["trial.json"]
    assert there.fetch(0, tmp_path / "whole", everything=True)
    assert (tmp_path / "whole" / "adapters" / "adapters.safetensors").read_bytes() == b"weights"
    assert not (tmp_path / "whole" / "checkpoints").exists()


def test_a_trial_that_was_put_in_part_is_not_there_and_the_one_before_stays(
    trial_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    there = Artifacts(f"file://{tmp_path}/artefacts", "sweep")
    there.put(0, trial_directory)
    (trial_directory / "trial.json").write_text('{"new": 1}')
    with monkeypatch.context() as patched, pytest.raises(UserError, match="Trial 0 cannot be put in file:"):
        patched.setattr(LocalFileSystem, "pipe_file", lambda *given, **named: (_ for _ in ()).throw(OSError("disk full")))
        there.put(0, trial_directory)
    there.fetch(0, tmp_path / "back", everything=True)
    assert (tmp_path / "back" / "trial.json").read_text() == "{}"
    there.put(0, trial_directory)
    there.fetch(0, tmp_path / "back", everything=True)
    assert (tmp_path / "back" / "trial.json").read_text() == '{"new": 1}'
    assert (
        len([each for each in (tmp_path / "artefacts" / "sweep" / "trials" / "0").iterdir() if each.name == "manifest.json"]) == 1
    )


def test_a_damaged_artefact_is_refused(trial_directory: Path, tmp_path: Path) -> None:
    there = Artifacts(f"file://{tmp_path}/artefacts", "sweep")
    there.put(0, trial_directory)
    next((tmp_path / "artefacts").rglob("adapters.safetensors")).write_bytes(b"weight5")
    with pytest.raises(UserError, match=r"adapters/adapters\.safetensors of trial 0 is damaged"):
        there.fetch(0, tmp_path / "back", everything=True)


@pytest.mark.parametrize(("url", "said"), [("s3://b/x", "pip install s3fs|Install s3fs"), ("nosuch://b/x", "Protocol not known")])
def test_artefacts_that_cannot_be_written_are_told(url: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=f"--artifacts {url}.*({said})"):
        Artifacts(url, "sweep").check("token")


def probed(job: AgentJob, named: list[str], /, **changed: Any) -> list[dict[str, Any]]:
    """The probe of one machine that is this one, but for what is changed."""

    def everywhere(name: str, *given: Any) -> dict[str, dict[str, Any] | str]:
        return {"far": {**getattr(probe_task, name)(*given), **changed}}

    return probe.check_workers(Cluster("dask", "tcp://h:1", (), everywhere, lambda *given: None), job, named)


def job_in(directory: Path, **others: Any) -> AgentJob:
    return AgentJob("s.yaml", str(directory), (), {}, **others)


def test_a_machine_that_sees_everything_is_good_and_nothing_of_the_probe_stays(tmp_path: Path) -> None:
    (found,) = probed(job_in(tmp_path, storage="x", artifacts=f"file://{tmp_path}/a"), [str(Path(__file__))])
    assert "directory" not in found and found["url"] == ""
    (found,) = probed(job_in(tmp_path), [])
    assert found["directory"] == "" and "url" not in found
    assert not [*tmp_path.rglob("*probe*")]
    assert probe.threads_each([{"host": "a", "cores": 8}, {"host": "b", "cores": 4}], 4) == 2


def test_a_machine_that_cannot_see_the_directory_or_a_file_is_named_with_the_reason(tmp_path: Path) -> None:
    data = tmp_path / "rows.json"
    data.write_text("[]")
    gone = {"directory": "it is not there", "paths": {str(data): ""}, "missing": ["mlx"]}
    with pytest.raises(UserError) as refused:
        probed(job_in(tmp_path), [str(data)], **gone)
    said = str(refused.value)
    assert said.startswith("The Dask cluster tcp://h:1 cannot do this sweep. Nothing was begun.\n  far: ")
    assert f"it cannot see the sweep's directory {tmp_path} (it is not there)" in said
    assert f"far: {data} is not there." in said and "far: not installed there: mlx." in said


def test_other_versions_and_other_content_are_named(tmp_path: Path) -> None:
    data = tmp_path / "rows.json"
    data.write_text("[]")
    versions = {**probe_task.versions(), "mlx": "0.1", "Python": "3.9"}
    with pytest.raises(UserError) as refused:
        probed(job_in(tmp_path), [str(data)], versions=versions, paths={str(data): "0" * 64})
    said = str(refused.value)
    here = probe_task.versions()
    assert f"far: mlx is 0.1 there, {here['mlx']} here." in said and f"far: Python is 3.9 there, {here['Python']} here." in said
    assert f"far: {data} has other content there than here." in said


def test_another_directory_of_the_same_name_is_not_the_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_task, "PATIENCE_SECONDS", 0.0)
    found = probe_task.seen(str(tmp_path), ".probe-x", [], "", [])
    assert found["directory"] == "it is another directory of the same name"
    assert probe_task.seen(str(tmp_path / "no"), ".probe-x", [], "", [])["directory"] == "it is not there"


def test_memory_is_no_place_for_artefacts_of_another_process(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    script = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); from finetune_dataflow.sweeps import probe_task\n"
        "print(json.dumps(probe_task.seen('', 'token', [], 'memory://a/sweep', [])['url']))"
    )
    root = str(Path(__file__).parent.parent)
    Artifacts("memory://a", "sweep").check("token")
    ended = subprocess.run([sys.executable, "-c", script, root], capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout.splitlines()[-1]) == "what the sweep wrote is not there (FileNotFoundError)"
