"""Adapters in PEFT's layout against the real PEFT, transformers and torch: the logits are equal both ways, in float32 on the CPU.

They run in the peers' environment (`make bench` makes .venv-peers; FINETUNE_DATAFLOW_PEERS names another's Python).
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import MODEL_REMAPPING
from numpy.typing import NDArray
from safetensors.numpy import save_file

from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.peft_layout import as_mlx_adapter, write_peft
from finetune_dataflow.engine.peft_names import RENAMED, SAME_NAMES, BaseLayers, Layer
from tests.drawn_adapters import adapter_of
from tests.recorded_losses import RECORDING, draw_weights, write_model

REPOSITORY = Path(__file__).parent.parent
PYTHON = Path(os.environ.get("FINETUNE_DATAFLOW_PEERS", REPOSITORY / ".venv-peers" / "bin" / "python"))
RECORDED: dict[str, Any] = json.loads(RECORDING.read_text())
IDS: list[int] = RECORDED["rows"][2]["input_ids"]
CLOSE = 1e-3
MIXTURES = ("mixtral", "qwen3_moe", "qwen3_next")
ATTENTION = ("self_attn.q_proj", "self_attn.v_proj")

pytestmark = pytest.mark.skipif(
    not PYTHON.is_file(), reason=f"there is no environment with PEFT: {PYTHON} is missing (make bench)"
)

# Our adapters: the recorded model and the settings of the method, besides rank 4 and scale 2 on all blocks.
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name} lora": (name, {}) for name in RECORDED["models"] if name != "mamba2"},
    **{
        f"{name} dora": (name, {"fine_tune_type": "dora"})
        for name in ("llama", "qwen2", "phi3", "gemma2", "gpt2", "cohere", "stablelm")
    },
    "mamba2 lora": ("mamba2", {"lora_keys": ("mixer.in_proj",)}),
    "mixtral dora of the attention": ("mixtral", {"fine_tune_type": "dora", "lora_keys": ATTENTION}),
    "mixtral some experts": ("mixtral", {"lora_keys": ("block_sparse_moe.switch_mlp.up_proj", "self_attn.k_proj")}),
    "mixtral rslora": ("mixtral", {"use_rslora": True}),
    "llama rslora": ("llama", {"use_rslora": True}),
    "llama last block": ("llama", {"num_layers": 1}),
    "llama tied embedding": ("llama", {"lora_keys": ("model.embed_tokens", *ATTENTION)}),
    "gemma tied embedding": ("gemma", {"lora_keys": ("model.embed_tokens",)}),
    "gpt2 tied embedding and positions": ("gpt2", {"lora_keys": ("model.wte", "model.wpe")}),
    "llama_untied embedding and head": ("llama_untied", {"lora_keys": ("model.embed_tokens", "lm_head", "mlp.up_proj")}),
    "llama_untied dora head": ("llama_untied", {"fine_tune_type": "dora", "lora_keys": ("lm_head", "mlp.up_proj")}),
}
# PEFT's: the recorded model and the LoraConfig.
LINEAR = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name} lora": (name, LINEAR) for name in RECORDED["models"] if name not in (*MIXTURES, "mamba2", "llama_untied")},
    **{f"{name} dora": (name, {**LINEAR, "use_dora": True}) for name in ("llama", "qwen2", "phi3", "gemma2", "gpt2")},
    "llama rslora": ("llama", {**LINEAR, "use_rslora": True, "lora_dropout": 0.1}),
    "llama two modules": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "llama one block": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0], "r": 3, "lora_alpha": 5}),
    "llama a regular expression": ("llama", {"target_modules": r".*\.(0\.self_attn\.q|1\.mlp\.down)_proj"}),
    "llama many ranks": ("llama", {
        "target_modules": "all-linear", "r": 4, "lora_alpha": 8, "rank_pattern": {"k_proj": 7, r"layers\.1\.mlp\.up_proj": 2},
        "alpha_pattern": {"v_proj": 24, "k_proj": 1, r"0\.mlp\.down_proj": -3},
    }),
    "llama many ranks rslora": ("llama", {
        **LINEAR, "rank_pattern": {"k_proj": 7}, "alpha_pattern": {"v_proj": 24}, "use_rslora": True,
    }),
    "llama dora of many ranks": ("llama", {
        **LINEAR, "rank_pattern": {"k_proj": 7}, "alpha_pattern": {"v_proj": 24}, "use_dora": True,
    }),
    "llama_untied embedding and head": ("llama_untied", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "llama tied embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "gemma tied embedding": ("gemma", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "llama orthogonal": ("llama", {**LINEAR, "init_lora_weights": "orthogonal"}),
    "mixtral attention": ("mixtral", {"target_modules": ["q_proj", "v_proj"]}),
    "mixtral experts": ("mixtral", {
        "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "gate.weight"],
        "rank_pattern": {"gate_up_proj": 3}, "alpha_pattern": {r"gate\.weight": 20},
    }),
    "qwen3_moe gate and up": ("qwen3_moe", {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}),
    "qwen3_moe down": ("qwen3_moe", {"target_modules": ["k_proj"], "target_parameters": ["mlp.experts.down_proj"]}),
    "qwen3_next shared expert": ("qwen3_next", {
        "target_modules": ["out_proj", "shared_expert_gate"], "target_parameters": ["shared_expert.down_proj.weight"],
    }),
}  # fmt: skip
# What mlx-lm asks of a config and transformers 5 says otherwise, or not at all.
ASKED = {
    "rope_theta": 10000.0, "rope_scaling": None, "partial_rotary_factor": 0.5, "mlp_bias": False, "post_norm": False,
    "qk_norm": True, "n_ctx": 512, "block_dim": 2560, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True, "num_experts": 4, "state_size": 128,
    "tie_word_embeddings": False,
}  # fmt: skip

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Compared:
    """The logits of both sides and of the base model, and what PEFT adapted and warned of."""

    ours: Logits
    theirs: Logits
    base: Logits
    facts: dict[str, Any]

    @property
    def difference(self) -> float:
        return float(abs(self.ours - self.theirs).max())

    @property
    def effect(self) -> float:
        return float(abs(self.ours - self.base).max())


@pytest.fixture(scope="module", autouse=True)
def cpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.Device(mx.cpu))
    yield
    mx.set_default_device(before)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, models = tmp_path_factory.mktemp("bases"), RECORDED["models"]
    return {
        name: write_model(root / name, entry["config"], draw_weights(entry["shapes"], entry["seed"]))
        for name, entry in models.items()
    }


@pytest.fixture(scope="module")
def written(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compared]:
    """Our adapters, written in PEFT's layout and loaded by PEFT."""
    root = tmp_path_factory.mktemp("written")
    ours = {case: adapter_of(bases[name], root / "ours" / case, **settings) for case, (name, settings) in OURS.items()}
    theirs = {case: write_peft(ours[case], bases[name], root / "theirs" / case) for case, (name, _) in OURS.items()}
    jobs = {case: {"base": str(bases[name]), "adapter": str(theirs[case])} for case, (name, _) in OURS.items()}
    found = computed_by_peft(jobs, root)
    return {case: compared(bases[name], ours[case], *found[case]) for case, (name, _) in OURS.items()}


@pytest.fixture(scope="module")
def read(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compared]:
    """PEFT's adapters, read as ours."""
    root = tmp_path_factory.mktemp("read")
    jobs = {
        case: {"base": str(bases[name]), "adapter": str(root / "theirs" / case), "config": {"task_type": "CAUSAL_LM", **config}}
        for case, (name, config) in THEIRS.items()
    }
    found = computed_by_peft(jobs, root)
    ours = {case: as_mlx_adapter(root / "theirs" / case, bases[name], root / "ours") for case, (name, _) in THEIRS.items()}
    return {case: compared(bases[name], ours[case], *found[case]) for case, (name, _) in THEIRS.items()}


def logits_of(base: Path, adapter: Path | None = None) -> Logits:
    return np.array(load_model(base, adapter)(mx.array([IDS])))[0]


def computed_by_peft(jobs: Mapping[str, dict[str, Any]], root: Path) -> dict[str, tuple[Logits, dict[str, Any]]]:
    """PEFT's logits and facts of each job, all in one process."""
    every = [{**job, "ids": IDS, "logits": str(root / f"{n}.npy")} for n, job in enumerate(jobs.values())]
    facts = worker(every, root)
    return {case: (np.load(root / f"{n}.npy"), facts[n]) for n, case in enumerate(jobs)}


def worker(jobs: list[dict[str, Any]], root: Path) -> list[dict[str, Any]]:
    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [str(PYTHON), str(REPOSITORY / "tests_full" / "peft_worker.py"), str(root / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def compared(base: Path, adapter: Path, theirs: Logits, facts: dict[str, Any]) -> Compared:
    return Compared(logits_of(base, adapter), theirs, logits_of(base), facts)


def table(name: str, cases: Mapping[str, Compared]) -> str:
    lines = [f"{case:38} {each.difference:.1e}   {each.effect:6.2f}" for case, each in cases.items()]
    return "\n".join([f"\n{name:38} max. difference   the adapter moves logits by", *lines])


@pytest.mark.parametrize("case", OURS)
def test_peft_computes_with_our_adapter_what_we_do(written: dict[str, Compared], case: str) -> None:
    each = written[case]
    assert each.difference < CLOSE
    assert each.effect > 0.05


@pytest.mark.parametrize("case", THEIRS)
def test_we_compute_with_their_adapter_what_peft_does(read: dict[str, Compared], case: str) -> None:
    each = read[case]
    assert each.difference < CLOSE
    assert each.effect > 0.05


def test_peft_misses_no_tensor_and_leaves_none_over(written: dict[str, Compared]) -> None:
    said = [text for each in written.values() for text in each.facts["warnings"]]
    assert not [text for text in said if "missing" in text.lower() or "unexpected" in text.lower() or "inconsistency" in text]


def test_peft_adapts_the_layers_that_are_adapted_and_no_others(written: dict[str, Compared]) -> None:
    attention = [f"model.layers.{block}.self_attn.{name}_proj" for block in (0, 1) for name in "qv"]
    assert written["mixtral dora of the attention"].facts["adapted"] == attention
    assert written["llama tied embedding"].facts["adapted"] == ["lm_head", "model.embed_tokens", *attention]
    assert written["llama last block"].facts["adapted"] == [
        "model.layers.1.mlp.down_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]  # fmt: skip
    assert len(written["phi3 lora"].facts["adapted"]) == 8


def test_the_differences_are_printed(
    written: dict[str, Compared], read: dict[str, Compared], capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print(table("ours in PEFT", written), table("PEFT's in ours", read), sep="\n")


def test_an_adapter_of_the_time_when_experts_were_modules_is_read_as_peft_reads_it(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base, generator = bases["mixtral"], np.random.default_rng(5)
    sizes = {"w1": (128, 64), "w2": (64, 128), "w3": (128, 64)}
    names = {f"block_sparse_moe.experts.{expert}.{name}": sizes[name] for expert in range(4) for name in sizes}
    names |= {"self_attn.q_proj": (64, 64), "block_sparse_moe.gate": (4, 64)}
    tensors = {}
    for block in (0, 1):
        for name, (out, width) in names.items():
            key = f"base_model.model.model.layers.{block}.{name}"
            tensors[f"{key}.lora_A.weight"] = generator.normal(0, 0.1, (2, width)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = generator.normal(0, 0.1, (out, 2)).astype(np.float32)
    adapter = tmp_path / "old"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6,
              "target_modules": ["q_proj", "gate", "w1", "w2", "w3"]}  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    theirs, facts = computed_by_peft({"old": {"base": str(base), "adapter": str(adapter)}}, tmp_path)["old"]
    each = compared(base, as_mlx_adapter(adapter, base, tmp_path / "cache"), theirs, facts)
    assert each.difference < CLOSE and each.effect > 0.05


@pytest.mark.parametrize("model_type", sorted(SAME_NAMES | RENAMED.keys()))
def test_transformers_has_each_layer_by_the_name_that_the_tables_say(names: dict[str, Any], model_type: str) -> None:
    found = names[model_type]
    config = {**ASKED, **{key: value for key, value in found["config"].items() if value is not None}}
    config.setdefault("head_dim", config.get("hidden_size", 1) // config.get("num_attention_heads", 1))
    config.setdefault("intermediate_size", config.get("expand", 1) * config.get("hidden_size", 1))
    if "text_config" in config:
        config["text_config"] = {"tie_word_embeddings": False, **config["text_config"]}
    module = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(model_type, model_type)}")
    model = module.Model(module.ModelArgs.from_dict(config))
    base = BaseLayers(Path(model_type), {"model_type": model_type}, {}, {}, 0, {})
    checked = 0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            kind = "linear" if isinstance(layer, nn.Linear) else "embedding"
            theirs = base.name_in_transformers(Layer(name, kind, tuple(layer.weight.shape), False))  # type: ignore[arg-type]
            if not re.search(r"\.(block_sparse_moe|mlp)\.(gate|router)$", name):  # a router, which is no linear layer there
                assert found["layers"].get(theirs) == list(layer.weight.shape), theirs
                checked += 1
    assert checked > 1


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The layers of each architecture in transformers."""
    types = sorted(SAME_NAMES | RENAMED.keys())
    found = worker([{"model_type": each} for each in types], tmp_path_factory.mktemp("names"))
    return dict(zip(types, found, strict=True))
