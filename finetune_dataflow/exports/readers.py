"""What reads an export back: mlx-lm, and where a Python is at hand that has them, transformers with PEFT and llama.cpp.

Each answers the same two questions on the same token ids: the distribution of the next token at every supervised place, and
the greedy reply to every prompt.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finetune_dataflow.engine.chat import ChatEncoder
from finetune_dataflow.engine.settings import GenerationSettings
from finetune_dataflow.errors import UserError
from finetune_dataflow.exports.rows import GateRow

WORKER = Path(__file__).with_name("outside_reader.py")
LIBRARIES = ("torch", "transformers", "peft", "gguf", "xllamacpp")
_REPORTED = 2000  # characters of what a failed reader printed

Floats = NDArray[np.float32]


class Reader(Protocol):
    """A model as some tool reads it."""

    name: str

    def log_probabilities(self, rows: Sequence[GateRow]) -> Iterator[Floats] | None:
        """Of each row in turn, float32 [places, vocabulary]; None where the tool does not tell them."""
        ...

    def replies(self, rows: Sequence[GateRow], encoder: ChatEncoder, settings: GenerationSettings) -> list[str]:
        """The greedy reply to each row's prompt."""
        ...


@dataclass
class MlxReader:
    """A model directory, with or without an adapter, as mlx-lm loads it."""

    base: Path
    adapter: Path | None = None
    name: str = f"mlx-lm {metadata.version('mlx-lm')}"

    @functools.cached_property
    def model(self) -> Any:
        """The loaded model."""
        from finetune_dataflow.engine.models import load_model

        return load_model(self.base, self.adapter)

    def log_probabilities(self, rows: Sequence[GateRow]) -> Iterator[Floats]:
        """As `Reader` has it."""
        import mlx.core as mx

        for row in rows:
            logits = self.model(mx.array([row.ids[:-1]]))[0].astype(mx.float32)
            # In float64: a sum of 50,000 float32 numbers one by one is off by 1e-4, more than many an export.
            chosen = np.array(logits[mx.array([place - 1 for place in row.places])], dtype=np.float64)
            highest = chosen.max(axis=1, keepdims=True)
            yield (chosen - highest - np.log(np.exp(chosen - highest).sum(axis=1, keepdims=True))).astype(np.float32)

    def replies(self, rows: Sequence[GateRow], encoder: ChatEncoder, settings: GenerationSettings) -> list[str]:
        """As `Reader` has it."""
        from finetune_dataflow.engine.generation import replies_of

        found = replies_of(self.model, [row.prompt for row in rows], encoder, settings, f"{self.name}: replies")
        return [encoder.reply_text(each.token_ids) for each in found]


@dataclass
class OutsideReader:
    """An export as a tool in another process reads it.

    tool: "transformers", "peft" or "llama.cpp". request: what is read: `model`, and `adapter` where it is apart. directory: of
    this reader alone, for what goes to and fro.
    """

    python: str
    tool: str
    name: str
    request: dict[str, str]
    directory: Path

    def log_probabilities(self, rows: Sequence[GateRow]) -> Iterator[Floats] | None:
        """As `Reader` has it; llama.cpp's server tells of sampled tokens only."""
        if self.tool == "llama.cpp":
            return None
        asked = [{"ids": row.ids[:-1], "places": [place - 1 for place in row.places]} for row in rows]
        self._answer({"rows": asked})
        return (np.load(self.directory / f"row-{number}.npy") for number in range(len(rows)))

    def replies(self, rows: Sequence[GateRow], encoder: ChatEncoder, settings: GenerationSettings) -> list[str]:
        """As `Reader` has it."""
        asked = {
            "prompts": [row.prompt for row in rows], "stops": sorted(encoder.stop_ids), "max_tokens": settings.max_tokens
        }  # fmt: skip
        replies = self._answer(asked)["replies"]
        return [each.strip() if isinstance(each, str) else encoder.reply_text(each) for each in replies]

    def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What the worker says. Raises UserError where it fails: the tool does not read the export."""
        (self.directory / "request.json").write_text(json.dumps({"tool": self.tool, **self.request, **asked}))
        command = [self.python, str(WORKER), str(self.directory)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            said = "\n".join(done.stderr.strip().splitlines()[-6:])[-_REPORTED:]
            raise UserError(f"{self.name} cannot read the export:\n{said}")
        answer: dict[str, Any] = json.loads((self.directory / "answer.json").read_text())
        return answer


@functools.cache
def installed(python: str) -> dict[str, str]:
    """The versions of `LIBRARIES` that a Python has. Raises UserError where it is none."""
    code = (
        "import json, sys\nfrom importlib import metadata\nfound = {}\nfor name in sys.argv[1:]:\n"
        "    try: found[name] = metadata.version(name)\n"
        "    except metadata.PackageNotFoundError: pass\nprint(json.dumps(found))"
    )
    try:
        done = subprocess.run([python, "-c", code, *LIBRARIES], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"check_with={python!r} cannot be run: {error.strerror}. Expected the path of a Python.") from error
    try:
        found: dict[str, str] = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        raise UserError(f"check_with={python!r} is no Python: {done.stderr.strip()[-200:]}.") from error
    return found


def outside_readers(
    python: str, wanted: Sequence[tuple[str, dict[str, str]]], directory: Path
) -> tuple[list[OutsideReader], list[str]]:
    """The readers of `wanted` (tool, request) that a Python has, and in words those that it has not."""
    python = python or sys.executable
    there, readers, missing = installed(python), [], []
    for tool, request in wanted:
        needs = {"transformers": ("torch", "transformers"), "peft": ("torch", "transformers", "peft")}.get(tool, ("xllamacpp",))
        needs = (*needs, *(("gguf",) if tool == "transformers" and request["model"].endswith(".gguf") else ()))
        lacking = [each for each in needs if each not in there]
        if lacking:
            missing.append(f"not read by {tool}: {', '.join(lacking)} is not installed (check_with names a Python that has it)")
            continue
        shown = {"transformers": "transformers", "peft": "peft", "llama.cpp": "xllamacpp"}[tool]
        place = Path(tempfile.mkdtemp(dir=directory))
        readers.append(OutsideReader(python, tool, f"{tool} {there[shown]}", request, place))
    return readers, missing
