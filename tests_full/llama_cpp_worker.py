"""What llama.cpp makes of GGUF files, through the package xllamacpp; run by a Python that has it, for the tests.

usage: llama_cpp_worker.py REQUESTS.json ANSWERS.json

Each request: `model`, the path of a .gguf file; `lora`, that of an adapter's, or nothing; `ids`, token ids after which the
log probability of every token is wanted; `prompts`, user messages to answer greedily in at most `max_tokens` tokens through
the file's own chat template. Each answer: `log_probabilities`, [token id, value] each; `replies`, texts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import xllamacpp  # type: ignore[import-not-found,unused-ignore]

MANY = 1_000_000


def main(requests_path: str, answers_path: str) -> None:
    """Answer every request."""
    answers = [answer(request) for request in json.loads(Path(requests_path).read_text())]
    Path(answers_path).write_text(json.dumps(answers))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request."""
    settings = xllamacpp.CommonParams()
    settings.model.path = request["model"]
    settings.n_gpu_layers, settings.n_ctx, settings.n_parallel, settings.warmup = 0, 512, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    if request.get("lora"):
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(request["lora"], 1.0)]
    server = xllamacpp.Server(settings)
    greedy = {"temperature": 0, "cache_prompt": False}
    found: dict[str, Any] = {}
    if request.get("ids"):
        asked = {"prompt": request["ids"], "n_predict": 8, "n_probs": MANY, "ignore_eos": True, **greedy}
        first = completed(server.handle_completions, asked)["choices"][0]["logprobs"]["content"][0]
        found["log_probabilities"] = [[each["id"], each["logprob"]] for each in first["top_logprobs"]]
    if request.get("prompts"):
        found["replies"] = []
        for prompt in request["prompts"]:
            asked = {"messages": [{"role": "user", "content": prompt}], "max_tokens": request["max_tokens"], **greedy}
            found["replies"].append(completed(server.handle_chat_completions, asked)["choices"][0]["message"]["content"])
    return found


def completed(handle: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """What the server answers to one request."""
    answers: list[Any] = []
    given = handle(asked, answers.append) or answers[-1]
    return given if isinstance(given, dict) else json.loads(given)


if __name__ == "__main__":
    main(*sys.argv[1:])
