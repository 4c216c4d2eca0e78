"""Exports read by the tools that they are for, and pushed to a hub: a small server on loopback that speaks its protocol."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_dataflow.cli import main
from tests.conftest import WORDS
from tests.test_gguf_writer import write_model
from tests_full.outside import python_with

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a random llama whose tokenizer has merges."""
    data_file = tmp_path_factory.mktemp("data") / "support.json"
    rows = [{"question": f"What is {WORDS[n % 16]} {n}?", "reply": f"It is {WORDS[(3 * n + 1) % 16]}."} for n in range(60)]
    data_file.write_text(json.dumps(rows))
    model = write_model(tmp_path_factory.mktemp("models") / "tiny", "llama")
    out = tmp_path_factory.mktemp("runs") / "run"
    named = ["--data", str(data_file), "--input-text-key", "question", "--output-text-key", "reply", "--model", str(model)]
    assert main([*named, "--num-layers", "2", "--max-tokens", "8", "--learning-rate", "0.01", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(("kind", "reader"), [("fused", "transformers"), ("peft", "peft")])
def test_transformers_and_peft_read_what_mlx_lm_does(run: Path, tmp_path: Path, kind: str, reader: str) -> None:
    python, out = python_with("torch", "transformers", "peft"), tmp_path / "out"
    command = ["export", "--adapter", str(run / "adapters"), "--to", kind, "--out", str(out), "--check-with", str(python)]
    assert main([*command, "--gate-rows", "4"]) == 0
    scores = json.loads((out / "export.json").read_text())["gate"]["scores"]
    assert [each["reader"].split()[0] for each in scores] == ["mlx-lm", reader]
    assert all(each["kl_max"] < 1e-6 and each["top1"] == 1.0 and each["same_replies"] == 4 for each in scores)


def test_penalties_that_the_base_model_comes_with_do_not_make_its_replies_others(run: Path, tmp_path: Path) -> None:
    python, base = python_with("torch", "transformers"), Path(yaml.safe_load((run / "config.yaml").read_text())["model_id"])
    penal = shutil.copytree(base, tmp_path / "base")
    (penal / "generation_config.json").write_text(json.dumps({"repetition_penalty": 9.0, "no_repeat_ngram_size": 1}))
    out = tmp_path / "out"
    command = ["export", "--adapter", str(run / "adapters"), "--to", "fused", "--out", str(out), "--check-with", str(python)]
    assert main([*command, "--model", str(penal), "--gate-rows", "4"]) == 0
    scores = json.loads((out / "export.json").read_text())["gate"]["scores"]
    assert [each["same_replies"] for each in scores] == [4, 4]


def test_llama_cpp_gives_the_adapters_replies_to_a_gguf_file(run: Path, tmp_path: Path) -> None:
    python, out = python_with("xllamacpp"), tmp_path / "out"
    command = ["export", "--adapter", str(run / "adapters"), "--to", "gguf", "--out", str(out), "--check-with", str(python)]
    assert main([*command, "--gate-rows", "4"]) == 0
    scores = json.loads((out / "export.json").read_text())["gate"]["scores"]
    (found,) = (each for each in scores if each["reader"].startswith("llama.cpp"))
    assert found["same_replies"] >= 3 and found["kl_mean"] is None


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a push needs: a repository is made, files are put into its store, and committed."""

    made: list[dict[str, Any]]
    stored: dict[str, bytes]
    committed: list[dict[str, Any]]

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        """What is asked of a repository before a push."""
        self._answer({"id": "someone/support", "sha": "0" * 40, "siblings": [], "private": True, "tags": []})

    def do_PUT(self) -> None:
        """A file for the store."""
        body = self._body()
        self.stored[hashlib.sha256(body).hexdigest()] = body
        self._answer({})

    def do_POST(self) -> None:
        """The steps of a push."""
        body = self._body()
        here = f"http://{self.headers['Host']}"
        if self.headers.get("Authorization") != "Bearer hf_secret":
            self._answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            self._answer({"url": f"{here}/someone/support", "name": "someone/support", "id": "1"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            large = re.compile(r".*\.(safetensors|gguf)$")
            self._answer({"files": [
                {"path": each["path"], "uploadMode": "lfs" if large.match(each["path"]) else "regular", "shouldIgnore": False}
                for each in files
            ]})  # fmt: skip
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            self._answer({"transfer": "basic", "objects": [
                {**each, "actions": {"upload": {"href": f"{here}/store/{each['oid']}", "header": {}}}} for each in objects
            ]})  # fmt: skip
        elif "/commit/" in self.path:
            self.committed += [json.loads(line) for line in body.decode().splitlines() if line]
            self._answer({"commitUrl": f"{here}/someone/support/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True})
        else:
            self._answer({"error": f"not known here: {self.path}"}, 404)


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    kept = type("KeptHub", (Hub,), {"made": [], "stored": {}, "committed": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kept)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", kept
    server.shutdown()


def pushing(run: Path, out: Path, endpoint: str, token: str, *options: str) -> subprocess.CompletedProcess[str]:
    named = ["--adapter", str(run / "adapters"), "--to", "hub", "--hub-id", "someone/support", "--out", str(out)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {
        **kept,
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "*",
        "no_proxy": "*",
    }
    command = [sys.executable, "run.py", "export", *named, "--gate-rows", "2", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_with_a_token_every_file_is_pushed_as_one_commit(run: Path, tmp_path: Path, hub: tuple[str, type[Hub]]) -> None:
    endpoint, kept = hub
    done = pushing(run, tmp_path / "out", endpoint, "hf_secret", "--private")
    assert done.returncode == 0, done.stderr
    assert f"Pushed to {endpoint}/someone/support" in done.stdout and "hf_secret" not in done.stdout + done.stderr
    (made,) = kept.made
    assert (made["name"], made["organization"]) == ("support", "someone")
    assert made.get("private") is True or made.get("visibility") == "private"
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert kept.stored == {hashlib.sha256(weights).hexdigest(): weights}
    paths = {each["value"]["path"] for each in kept.committed if each["key"] != "header"}
    assert paths == {each.name for each in (tmp_path / "out").iterdir()}


def test_a_dry_run_asks_nothing_of_the_hub(run: Path, tmp_path: Path, hub: tuple[str, type[Hub]]) -> None:
    endpoint, kept = hub
    done = pushing(run, tmp_path / "out", endpoint, "hf_secret", "--dry-run")
    assert done.returncode == 0 and "Not pushed: a dry run." in done.stdout
    assert not kept.made and not kept.stored and not kept.committed


@pytest.mark.parametrize("silent", [False, True])
def test_a_push_that_is_refused_or_not_answered_says_so_and_keeps_the_export(
    run: Path, tmp_path: Path, hub: tuple[str, type[Hub]], silent: bool
) -> None:
    done = pushing(run, tmp_path / "out", "http://127.0.0.1:9" if silent else hub[0], "hf_wrong")
    assert done.returncode == 2, done.stderr
    assert "someone/support could not be pushed" in done.stderr and "Traceback" not in done.stderr
    assert "hf_wrong" not in done.stderr and (tmp_path / "out" / "model.safetensors").is_file()
