"""What transformers, with PyTorch, makes of model directories and GGUF files; run by the peers' Python, for the tests.

usage: transformers_worker.py REQUESTS.json ANSWERS.json

Each request: `model`, the path of a directory or a .gguf file; `ids`, token ids whose logits are wanted; `texts`, texts to
tokenise; `prompts`, user messages to answer greedily in at most `max_tokens` tokens through the tokenizer's own chat template;
all but `model` may be left out. Each answer: `loading`, the names that were missing or not expected; `model_type`; `logits`;
`text_ids`; `prompt_ids` and `replies`, both token ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch  # type: ignore[import-not-found,unused-ignore]
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def main(requests_path: str, answers_path: str) -> None:
    """Answer every request."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with torch.no_grad():
        answers = [answer(request) for request in json.loads(Path(requests_path).read_text())]
    Path(answers_path).write_text(json.dumps(answers))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request."""
    path = Path(request["model"])
    place = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    directory = str(path.parent if place else path)
    model, loading = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, attn_implementation="eager", **place
    )
    model.eval()
    found: dict[str, Any] = {
        "loading": {name: sorted(map(str, loading.get(name) or [])) for name in PROBLEMS},
        "model_type": model.config.model_type,
    }
    if request.get("ids"):
        found["logits"] = model(torch.tensor([request["ids"]])).logits[0].float().tolist()
    if request.get("texts") or request.get("prompts"):
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, **place)
        found |= {"text_ids": [tokenizer.encode(text) for text in request.get("texts", [])], "prompt_ids": [], "replies": []}
        for prompt in request.get("prompts", []):
            messages = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = tokenizer.encode(text, add_special_tokens=False)
            whole = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=request["max_tokens"])[0]
            found["prompt_ids"].append(ids)
            found["replies"].append(whole[len(ids) :].tolist())
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
