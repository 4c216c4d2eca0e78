"""One export as transformers, PEFT or llama.cpp reads it; run by a Python that has them, which need not have this package.

usage: outside_reader.py DIRECTORY

request.json there: `tool`, `model` (a directory or a .gguf file), `adapter` (PEFT's directory, or a .gguf file for llama.cpp);
`rows` with `ids` and `places`, or `prompts` with `stops` and `max_tokens`. Written: row-N.npy, the log probabilities of the next
token at the places of each row, float32; answer.json, with `replies`: token ids, or texts where the tool gives these alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(directory: Path) -> None:
    """Answer the request."""
    request = json.loads((directory / "request.json").read_text())
    answer = _llama_cpp(request) if request["tool"] == "llama.cpp" else _transformers(request, directory)
    (directory / "answer.json").write_text(json.dumps(answer))


def _transformers(request: dict[str, Any], directory: Path) -> dict[str, Any]:
    import torch  # type: ignore[import-not-found,unused-ignore]

    model = _loaded(request)
    replies = []
    with torch.no_grad():
        for number, row in enumerate(request.get("rows", [])):
            logits = model(torch.tensor([row["ids"]])).logits[0].float()
            chosen = torch.log_softmax(logits[row["places"]], dim=-1)
            np.save(directory / f"row-{number}.npy", chosen.numpy())
        for prompt in request.get("prompts", []):
            ids = torch.tensor([prompt])
            whole = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=request["max_tokens"],
                eos_token_id=request["stops"], pad_token_id=request["stops"][0],
            )[0]  # fmt: skip
            reply = whole[len(prompt) :].tolist()
            ends = [place for place, each in enumerate(reply) if each in request["stops"]]
            replies.append(reply[: ends[0]] if ends else reply)
    return {"replies": replies}


def _loaded(request: dict[str, Any]) -> Any:
    """The model in float32, as the tool loads it; nothing may be missing or left over."""
    import torch  # type: ignore[import-not-found,unused-ignore]
    import transformers

    transformers.logging.set_verbosity_error()
    path = Path(request["model"])
    place = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent if place else path), dtype=torch.float32, output_loading_info=True, attn_implementation="eager",
        local_files_only=True, trust_remote_code=False, **place,
    )  # fmt: skip
    problems = {
        name: sorted(map(str, loading.get(name) or [])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if any(problems.values()):
        raise SystemExit(f"weights that do not fit: {problems}")
    model.generation_config = transformers.GenerationConfig()  # greedy, without penalties that the base model may come with
    if request.get("adapter"):
        from peft import PeftModel  # type: ignore[import-not-found,unused-ignore]

        model = PeftModel.from_pretrained(model, request["adapter"])
    return model.eval()


def _llama_cpp(request: dict[str, Any]) -> dict[str, Any]:
    import xllamacpp  # type: ignore[import-not-found,unused-ignore]

    settings = xllamacpp.CommonParams()
    settings.model.path = request["model"]
    longest = max((len(prompt) for prompt in request.get("prompts", [])), default=0) + request.get("max_tokens", 0)
    settings.n_gpu_layers, settings.n_ctx, settings.n_parallel, settings.warmup = 0, longest + 64, 1, False
    if request.get("adapter"):
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(request["adapter"], 1.0)]
    server = xllamacpp.Server(settings)
    replies = []
    for prompt in request.get("prompts", []):
        answers: list[Any] = []
        asked = {"prompt": prompt, "n_predict": request["max_tokens"], "temperature": 0, "cache_prompt": False}
        given = server.handle_completions(asked, answers.append) or answers[-1]
        replies.append((given if isinstance(given, dict) else json.loads(given))["choices"][0]["text"])
    return {"replies": replies}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
