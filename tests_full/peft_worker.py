"""The real PEFT with transformers and torch on the CPU, in an environment of its own, for tests_full/test_peft.py.

`python peft_worker.py JOBS.json`: a list of jobs, each with `base`, `ids` (the tokens), `logits` (the .npy file to write) and
`adapter`. With `config`, the arguments of a LoraConfig, an adapter is made, its matrices are drawn at random and it is saved in
`adapter`; without, the one that lies there is loaded. Printed is a line of JSON a job: which modules are adapted, and PEFT's
warnings. With `model_type` alone, nothing is computed: the line has the config that transformers makes up for such a model, and
its linear layers and embeddings with their shapes.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import numpy as np
import torch  # type: ignore[import-not-found,unused-ignore]
from peft import LoraConfig, PeftModel, get_peft_model  # type: ignore[import-not-found,unused-ignore]
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.pytorch_utils import Conv1D

SPREAD = 0.1  # of the matrices that are drawn


def computed(job: dict[str, Any]) -> dict[str, Any]:
    """Do one job: write its logits and say what was adapted."""
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32, attn_implementation="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if "config" in job:
            adapted = get_peft_model(model, LoraConfig(**job["config"]))
            draw(adapted)
            adapted.save_pretrained(job["adapter"])
        else:
            adapted = PeftModel.from_pretrained(model, job["adapter"])
    with torch.no_grad():
        logits = adapted.eval()(input_ids=torch.tensor([job["ids"]]), use_cache=False).logits
    np.save(job["logits"], logits[0].numpy())
    prefix = "base_model.model."
    names = [
        name.removeprefix(prefix).removesuffix(".base_layer")
        for name, module in adapted.named_modules()
        if "default" in {*getattr(module, "lora_A", ()), *getattr(module, "lora_embedding_A", ())}
    ]
    return {"adapted": sorted({*names}), "warnings": [str(each.message) for each in caught]}


def draw(model: Any) -> None:
    """Random values in every matrix of the adapter; magnitudes are changed by a random share."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = SPREAD * torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + noise)
            elif "lora_" in name:
                parameter.copy_(noise)


def described(model_type: str) -> dict[str, Any]:
    """The config, and the linear layers and embeddings by name, with (out, in) or (rows, width)."""
    config = AutoConfig.for_model(model_type)
    with torch.device("meta"):
        kind = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText
        model = kind.from_config(config)
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding | Conv1D):
            shape = list(module.weight.shape)
            layers[name] = shape[::-1] if isinstance(module, Conv1D) else shape
    return {"config": config.to_dict(), "layers": layers}


def main() -> None:
    """Do the jobs of a file."""
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        print(json.dumps(computed(job) if "base" in job else described(job["model_type"])), flush=True)


if __name__ == "__main__":
    main()
