"""PEFT's layout by names, shapes and numbers, without PEFT; tests_full/test_peft.py has the real one."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from finetune_dataflow.engine import peft_names
from finetune_dataflow.engine.adapters import check_adapter
from finetune_dataflow.engine.model_directories import quantized_model
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.peft_config import check_peft, read_settings
from finetune_dataflow.engine.peft_layout import as_mlx_adapter, in_mlx_layout, is_peft, read_peft, write_peft
from finetune_dataflow.engine.peft_matrices import LowRank, common
from finetune_dataflow.engine.peft_writing import base_name_of
from finetune_dataflow.engine.settings import QuantizationSettings
from finetune_dataflow.engine.starting_weights import read_weights
from finetune_dataflow.errors import UserError
from tests.architectures import write_architecture
from tests.drawn_adapters import adapter_of

IDS = [[72, 101, 108, 108, 111, 32, 258, 257, 65]]
QUERY = "model.layers.1.self_attn.q_proj"
PREFIX = "base_model.model."

Tensors = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The user's cache is out of reach."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FINETUNE_DATAFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: write_architecture(root / name, name, layers=2) for name in ("llama_untied", "mixtral", "gpt2", "gemma")}


def logits(base: Path, adapter: Path | None = None) -> NDArray[np.float32]:
    return np.array(load_model(base, adapter)(mx.array(IDS)))


def drawn(*shape: int, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng([seed, *shape]).normal(0, 0.1, shape).astype(np.float32)


def theirs(directory: Path, tensors: Tensors, **config: Any) -> Path:
    """An adapter as PEFT saves it."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({PREFIX + name: each for name, each in tensors.items()}, directory / "adapter_model.safetensors", {"format": "pt"})
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "peft_version": "0.21.2", **config}
    (directory / "adapter_config.json").write_text(json.dumps(said))
    return directory


def pair(name: str, out: int = 32, width: int = 32, rank: int = 4) -> Tensors:
    return {f"{name}.lora_A.weight": drawn(rank, width), f"{name}.lora_B.weight": drawn(out, rank)}


def test_an_adapter_is_written_under_peft_s_names_with_transposed_matrices(tiny_model: Path, tmp_path: Path) -> None:
    ours = adapter_of(
        tiny_model, tmp_path / "ours", lora_keys=("self_attn.q_proj", "mlp.up_proj"), num_layers=1, lora_dropout=0.05
    )
    out = write_peft(ours, tiny_model, tmp_path / "theirs", base_name="someone/tiny")
    before, after = load_file(ours / "adapters.safetensors"), load_file(out / "adapter_model.safetensors")
    assert {name: each.shape for name, each in after.items()} == {
        "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight": (4, 32),
        "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight": (32, 4),
        "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight": (4, 32),
        "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight": (64, 4),
    }
    assert np.array_equal(after[f"{PREFIX}{QUERY}.lora_A.weight"], before[f"{QUERY}.lora_a"].T)
    assert np.array_equal(after[f"{PREFIX}{QUERY}.lora_B.weight"], before[f"{QUERY}.lora_b"].T)
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((out / "adapter_config.json").read_text()) == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "someone/tiny", "inference_mode": True,
        "r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "use_rslora": False, "use_dora": False, "bias": "none",
        "target_modules": ["model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"],
        "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
        "layers_to_transform": None, "layers_pattern": None, "auto_mapping": None, "revision": None,
    }  # fmt: skip


def test_rslora_is_said_where_the_config_or_a_whole_alpha_shows_it(tiny_model: Path, tmp_path: Path) -> None:
    written = []
    for rank, said in ((8, False), (4, False), (4, True)):
        ours = adapter_of(tiny_model, tmp_path / "ours", lora_rank=rank, lora_scale=3.0, use_rslora=True)
        config = json.loads((ours / "adapter_config.json").read_text())
        assert config["lora_parameters"].pop("use_rslora") is True
        config["lora_parameters"].update({"use_rslora": True} if said else {})  # other writers of this layout do not say it
        (ours / "adapter_config.json").write_text(json.dumps(config))
        written.append(json.loads((write_peft(ours, tiny_model, tmp_path / "theirs") / "adapter_config.json").read_text()))
    # 3 * sqrt(rank) is alpha / sqrt(rank) for alpha = 3 * rank; of rank 4 it is 6, which alpha = 24 gives without roots, too.
    assert [(each["lora_alpha"], each["use_rslora"]) for each in written] == [(24, True), (24, False), (12, True)]


def test_dora_has_its_magnitudes_and_bfloat16_stays_bfloat16(tiny_model: Path, tmp_path: Path) -> None:
    ours = adapter_of(tiny_model, tmp_path / "ours", fine_tune_type="dora", lora_keys=("self_attn.v_proj",), num_layers=1)
    weights = read_weights(ours / "adapters.safetensors")
    mx.save_safetensors(str(ours / "adapters.safetensors"), {name: each.astype(mx.bfloat16) for name, each in weights.items()})
    after = read_weights(write_peft(ours, tiny_model, tmp_path / "theirs") / "adapter_model.safetensors")
    name = f"{PREFIX}model.layers.1.self_attn.v_proj"
    assert {key: each.shape for key, each in after.items()} == {
        f"{name}.lora_A.weight": (4, 32), f"{name}.lora_B.weight": (16, 4), f"{name}.lora_magnitude_vector": (16,)
    }  # fmt: skip
    assert {each.dtype for each in after.values()} == {mx.bfloat16}
    assert json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["use_dora"] is True


def test_a_tied_embedding_is_adapted_at_both_ends(tiny_model: Path, tmp_path: Path) -> None:
    ours = adapter_of(tiny_model, tmp_path / "ours", lora_keys=("model.embed_tokens",))
    out = write_peft(ours, tiny_model, tmp_path / "theirs")
    after, config = load_file(out / "adapter_model.safetensors"), json.loads((out / "adapter_config.json").read_text())
    assert {name: each.shape for name, each in after.items()} == {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": (4, 259), f"{PREFIX}model.embed_tokens.lora_embedding_B": (32, 4),
        f"{PREFIX}lm_head.lora_A.weight": (4, 32), f"{PREFIX}lm_head.lora_B.weight": (259, 4),
    }  # fmt: skip
    embedded, head = f"{PREFIX}model.embed_tokens.lora_embedding_", f"{PREFIX}lm_head.lora_"
    assert np.array_equal(after[f"{head}A.weight"], after[f"{embedded}B"].T)
    assert np.array_equal(after[f"{head}B.weight"], after[f"{embedded}A"].T)
    assert config["target_modules"] == ["lm_head", "model.embed_tokens"] and config["ensure_weight_tying"] is True


def test_experts_and_their_router_become_parameters(bases: dict[str, Path], tmp_path: Path) -> None:
    ours = adapter_of(bases["mixtral"], tmp_path / "ours", num_layers=1, lora_dropout=0.1)
    out = write_peft(ours, bases["mixtral"], tmp_path / "theirs")
    after, config = load_file(out / "adapter_model.safetensors"), json.loads((out / "adapter_config.json").read_text())
    block = "model.layers.1"
    assert {name: each.shape for name, each in after.items() if "self_attn" not in name} == {
        f"{PREFIX}{block}.mlp.gate.lora_A.weight": (4, 64), f"{PREFIX}{block}.mlp.gate.lora_B.weight": (4, 4),
        f"{PREFIX}{block}.mlp.experts.base_layer.lora_A.weight": (4 * 8, 64),
        f"{PREFIX}{block}.mlp.experts.base_layer.lora_B.weight": (256, 8 * 4),
        f"{PREFIX}{block}.mlp.experts.lora_A.weight": (4 * 4, 128), f"{PREFIX}{block}.mlp.experts.lora_B.weight": (64, 4 * 4),
    }  # fmt: skip
    assert config["target_modules"] == [f"{block}.self_attn.{each}_proj" for each in "koqv"]
    parameters = ["experts.down_proj", "experts.gate_up_proj", "gate.weight"]
    assert config["target_parameters"] == [f"{block}.mlp.{each}" for each in parameters]
    assert list(config["rank_pattern"].values()) == [8] and list(config["alpha_pattern"].values()) == [16]
    assert config["lora_dropout"] == 0  # PEFT refuses another for parameters
    settings = read_settings(out)
    assert settings.rank_and_scale(f"{block}.mlp.experts.gate_up_proj") == (8, 2.0)
    assert settings.rank_and_scale(f"{block}.mlp.experts.down_proj") == (4, 2.0)


def test_gpt2_has_transformers_names_and_says_that_its_weights_are_transposed(bases: dict[str, Path], tmp_path: Path) -> None:
    ours = adapter_of(bases["gpt2"], tmp_path / "ours", lora_keys=("attn.c_attn",), num_layers=1)
    out = write_peft(ours, bases["gpt2"], tmp_path / "theirs")
    name = f"{PREFIX}transformer.h.1.attn.c_attn"
    shapes = {key: each.shape for key, each in load_file(out / "adapter_model.safetensors").items()}
    assert shapes == {f"{name}.lora_A.weight": (4, 64), f"{name}.lora_B.weight": (192, 4)}
    assert json.loads((out / "adapter_config.json").read_text())["fan_in_fan_out"] is True


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama_untied", {}),
        ("llama_untied", {"num_layers": 1, "lora_keys": ("self_attn.k_proj", "lm_head", "model.embed_tokens")}),
        ("llama_untied", {"fine_tune_type": "dora", "use_rslora": True}),
        ("mixtral", {"num_layers": 1}),
        ("mixtral", {"lora_keys": ("block_sparse_moe.switch_mlp.down_proj",)}),
        ("gemma", {"lora_keys": ("model.embed_tokens", "mlp.down_proj")}),
        ("gpt2", {"lora_keys": ("model.wpe", "attn.c_proj")}),
    ],
)
def test_what_is_written_is_read_back_and_computes_the_same(
    bases: dict[str, Path], tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    base = bases[name]
    ours = adapter_of(base, tmp_path / "ours", **settings)
    back = as_mlx_adapter(write_peft(ours, base, tmp_path / "theirs"), base, tmp_path / "cache")
    assert not np.allclose(logits(base), logits(base, ours), atol=1e-2)
    np.testing.assert_allclose(logits(base, back), logits(base, ours), rtol=0, atol=1e-5)
    one, other = check_adapter(ours), check_adapter(back)
    assert (one["fine_tune_type"], one["num_layers"]) == (other["fine_tune_type"], other["num_layers"])
    before, after = (load_file(each / "adapters.safetensors") for each in (ours, back))
    assert before.keys() == after.keys()
    if name != "mixtral" or settings.get("lora_keys"):  # gate and up share their directions when they come back
        assert one["lora_parameters"]["scale"] == pytest.approx(other["lora_parameters"]["scale"], rel=1e-15)
        assert all(np.array_equal(before[key], after[key]) for key in before)


def test_a_peft_adapter_changes_the_weights_by_alpha_over_rank_times_b_times_a(tiny_model: Path, tmp_path: Path) -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    tensors = {**pair(names[0]), **pair(names[1], 32, 64)}
    adapter = theirs(tmp_path / "theirs", tensors, alpha_pattern={r"mlp\.down_proj": 20}, base_model_name_or_path="someone/tiny")
    merged = tmp_path / "merged"
    shutil.copytree(tiny_model, merged)
    weights = load_file(tiny_model / "model.safetensors")
    for name, scale in zip(names, (8 / 4, 20 / 4), strict=True):
        weights[f"{name}.weight"] += scale * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    save_file(weights, merged / "model.safetensors", {"format": "pt"})
    read = as_mlx_adapter(adapter, tiny_model, tmp_path / "cache")
    np.testing.assert_allclose(logits(tiny_model, read), logits(merged), atol=1e-5)
    config = check_adapter(read)
    assert config == {
        "fine_tune_type": "lora", "num_layers": 2, "model": "someone/tiny",
        "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": sorted(names)},
    }  # fmt: skip
    assert check_peft(adapter)["model"] == "someone/tiny"


def test_layers_of_the_last_blocks_are_named_within_them(tiny_model: Path, tmp_path: Path) -> None:
    adapter = theirs(tmp_path, {**pair("model.layers.1.self_attn.q_proj"), **pair("model.layers.1.mlp.up_proj", 64)})
    _, config = read_peft(adapter, tiny_model)
    assert (config["lora_parameters"]["keys"], config["num_layers"]) == (["mlp.up_proj", "self_attn.q_proj"], 1)


def test_one_rank_and_one_scale_are_made_of_many_without_changing_the_products() -> None:
    layers = {
        "x": LowRank(mx.array(drawn(6, 2)), mx.array(drawn(2, 5)), 2.0),
        "y": LowRank(mx.array(drawn(6, 3)), mx.array(drawn(3, 5)), 2.0),
        "z": LowRank(mx.array(drawn(6, 1)).astype(mx.bfloat16), mx.array([[0.5, -1.0, 3.0]]).astype(mx.bfloat16), 0.6),
    }
    arrays, rank, scale = common(layers)
    assert (rank, scale) == (3, 2.0)
    assert {name: each.shape for name, each in arrays.items()} == {
        "x.lora_a": (6, 3), "x.lora_b": (3, 5), "y.lora_a": (6, 3), "y.lora_b": (3, 5), "z.lora_a": (6, 3), "z.lora_b": (3, 3)
    }  # fmt: skip
    assert not arrays["x.lora_a"][:, 2:].any() and not arrays["x.lora_b"][2:].any()
    assert mx.array_equal(arrays["y.lora_b"], layers["y"].b)
    assert arrays["z.lora_a"].dtype == mx.bfloat16 and arrays["z.lora_b"].dtype == mx.float32
    assert np.array_equal(np.array(arrays["z.lora_b"][0]), np.array([0.15, -0.3, 0.9], np.float32))


def test_an_alpha_of_zero_leaves_a_layer_as_it_was(tiny_model: Path, tmp_path: Path) -> None:
    tensors = {**pair(QUERY), **pair("model.layers.1.mlp.up_proj", 64)}
    some = as_mlx_adapter(theirs(tmp_path / "some", tensors, alpha_pattern={"up_proj": 0}), tiny_model, tmp_path)
    alone = as_mlx_adapter(theirs(tmp_path / "alone", pair(QUERY)), tiny_model, tmp_path)
    np.testing.assert_allclose(logits(tiny_model, some), logits(tiny_model, alone), atol=1e-6)
    none = as_mlx_adapter(theirs(tmp_path / "none", tensors, lora_alpha=0), tiny_model, tmp_path)
    np.testing.assert_allclose(logits(tiny_model, none), logits(tiny_model), atol=1e-6)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"peft_type": "IA3"}, r"peft_type='IA3' is no adapter that mlx-lm has\. Expected 'LORA'"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type='PREFIX_TUNING' is no adapter"),
        ({"task_type": "SEQ_CLS"}, r"task_type='SEQ_CLS' is another task .* Expected 'CAUSAL_LM'"),
        ({"bias": "lora_only"}, "bias='lora_only' trains biases"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]: it replaces whole modules"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices=.3.: it replaces rows"),
        ({"lora_bias": True}, "lora_bias=True: it adds a bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changed the weights .* Let PEFT convert it"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changed"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq' changed"),
        ({"init_lora_weights": "newest"}, "init_lora_weights='newest' is not known"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=.*: it repeats layers"),
        ({"use_qalora": True}, "use_qalora=True: it is not known here what it does"),
        ({"lora_alhpa": 4}, "lora_alhpa=4: .* Did you mean 'lora_alpha'"),
        ({"r": 0}, "r=0 is not a whole number"),
        ({"r": True}, "r=True is not a whole number"),
        ({"lora_alpha": "16"}, "lora_alpha='16' is not a number"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0 is out of range"),
        ({"use_rslora": "yes"}, "use_rslora='yes' is not true or false"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern: 'q_proj': 2.5 is not"),
        ({"alpha_pattern": {"q_proj(": 2}}, r"alpha_pattern: 'q_proj\(': 2 is not a regular expression"),
        ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern=\['q_proj'\] is not an object"),
        ({"target_parameters": "gate"}, "target_parameters='gate' is not a list"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path=3 is not a name"),
    ],
)  # fmt: skip
def test_a_config_that_is_malformed_or_beyond_mlx_lm_is_refused_before_anything_is_read(
    tmp_path: Path, said: dict[str, Any], reason: str
) -> None:
    adapter = theirs(tmp_path, pair(QUERY), **said)
    with pytest.raises(UserError, match=reason) as caught:
        check_peft(adapter)
    assert str(adapter / "adapter_config.json") in str(caught.value)


def test_all_that_is_wrong_with_a_config_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        check_peft(theirs(tmp_path, pair(QUERY), bias="all", modules_to_save=["norm"], r=-1))
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_leave_the_base_alone_are_taken(tiny_model: Path, tmp_path: Path, start: bool | str) -> None:
    weights, _ = read_peft(theirs(tmp_path, pair(QUERY), init_lora_weights=start), tiny_model)
    assert set(weights) == {f"{QUERY}.lora_a", f"{QUERY}.lora_b"}


@pytest.mark.parametrize(
    ("tensors", "said", "reason"),
    [
        (pair("model.layers.7.self_attn.q_proj"), {}, r"layers\.7\.self_attn\.q_proj is no layer of it\. Did you mean 'layers"),
        (pair("model.layers.1.self_attn.q_prj"), {}, "q_prj is no layer of it.* Did you mean 'layers.1.self_attn.q_proj'"),
        (pair("model.vision_tower.layers.1.self_attn.q_proj"), {}, "vision_tower.* is no layer of it"),
        (pair(QUERY, out=48), {}, r"q_proj has matrices \(4, 32\) and \(48, 4\) for a layer \(32, 32\)"),
        (pair(QUERY, rank=3), {}, r"q_proj has matrices \(3, 32\) and \(32, 3\), where adapter_config\.json says rank 4"),
        ({f"{QUERY}.lora_A.weight": drawn(4, 32)}, {}, "q_proj has lora_A, expected lora_A, lora_B"),
        (pair(QUERY), {"use_dora": True}, "q_proj has lora_A, lora_B, expected lora_A, lora_B, lora_magnitude_vector"),
        ({**pair(QUERY), f"{QUERY}.lora_magnitude_vector": drawn(32)}, {}, "lora_magnitude_vector, expected lora_A, lora_B"),
        ({**pair(QUERY), f"{QUERY}.lora_B.bias": drawn(32)}, {}, r"lora_B\.bias is no part of an adapter"),
        ({**pair(QUERY), "model.norm.modules_to_save.weight": drawn(32)}, {}, "modules_to_save.weight is no part"),
        ({**pair(QUERY), "model.norm.weight": drawn(32)}, {}, r"weight model\.norm of \(32,\) for the base model's"),
        ({**pair(QUERY), "model.embed_tokens.weight": drawn(261, 32)}, {}, r"embed_tokens of \(261, 32\) .* one of \(259, 32\)"),
        ({**pair(QUERY), "model.embed_tokens.weight": drawn(259, 32)}, {}, "embed_tokens that is not that of the model"),
        (pair("lm_head", 259), {}, "changes lm_head otherwise than the other end"),
        ({"model.embed_tokens.lora_embedding_A": drawn(4, 259), "model.embed_tokens.lora_embedding_B": drawn(32, 4)}, {},
         "changes model.embed_tokens otherwise than the other end .* ensure_weight_tying=True"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_the_base_are_refused_with_the_layer(
    tiny_model: Path, tmp_path: Path, tensors: Tensors, said: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        read_peft(theirs(tmp_path, tensors, **said), tiny_model)


def test_a_misfit_says_what_the_adapter_was_made_for_and_how_many_layers_are_wrong(tiny_model: Path, tmp_path: Path) -> None:
    adapter = theirs(tmp_path, {**pair("model.a"), **pair("model.b"), **pair(QUERY)}, base_model_name_or_path="someone/else")
    with pytest.raises(UserError, match=r"it was made for someone/else\. .* \(and 1 more\)$"):
        read_peft(adapter, tiny_model)


def test_peft_s_copy_of_an_embedding_is_passed_over_where_it_is_the_base_model_s(tiny_model: Path, tmp_path: Path) -> None:
    embedding = load_file(tiny_model / "model.safetensors")["model.embed_tokens.weight"]
    a, b = drawn(4, 259), drawn(32, 4)
    tensors = {
        "model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b,
        "model.embed_tokens.base_layer.weight": embedding, "lm_head.base_layer.weight": embedding * np.float32(1.001),
    }  # fmt: skip
    tied = theirs(tmp_path / "tied", tensors, ensure_weight_tying=True)
    weights, config = read_peft(tied, tiny_model)
    assert set(weights) == {"model.embed_tokens.lora_a", "model.embed_tokens.lora_b"}
    assert config["lora_parameters"]["keys"] == ["model.embed_tokens"]
    ends = {"lm_head.lora_A.weight": np.ascontiguousarray(b.T), "lm_head.lora_B.weight": np.ascontiguousarray(a.T)}
    both, _ = read_peft(theirs(tmp_path / "both", {**tensors, **ends}), tiny_model)
    assert all(mx.array_equal(both[name], weights[name]) for name in weights)


def test_experts_without_an_adapter_of_their_own_get_zeros(bases: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.0.block_sparse_moe.experts.2.w2"
    weights, config = read_peft(theirs(tmp_path, pair(name, 64, 128)), bases["mixtral"])
    layer = "model.layers.0.block_sparse_moe.switch_mlp.down_proj"
    assert {key: each.shape for key, each in weights.items()} == {f"{layer}.lora_a": (4, 4, 128), f"{layer}.lora_b": (4, 64, 4)}
    assert [bool(each.any()) for each in weights[f"{layer}.lora_a"]] == [False, False, True, False]
    assert config["lora_parameters"]["keys"] == [layer]


def test_experts_that_the_base_lacks_or_that_do_not_divide_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["mixtral"]
    with pytest.raises(UserError, match=r"expert 4 of .*down_proj does not fit: the base model has 4"):
        read_peft(theirs(tmp_path, pair("model.layers.0.mlp.experts.4.down_proj", 64, 128)), base)
    with pytest.raises(UserError, match=r"down_proj: expected lora_A \(16, 128\) and lora_B \(64, 16\), for rank 4"):
        read_peft(theirs(tmp_path, pair("model.layers.0.mlp.experts", 64, 128, rank=15)), base)


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    adapter = theirs(tmp_path / "it's", pair(QUERY))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="is a pickle, which can run any code") as caught:
        check_peft(adapter)
    command = str(caught.value).splitlines()[-1]
    stub = tmp_path / "torch.py"
    stub.write_text("load = lambda path, **named: {}\n")
    command = command.replace("python -c", f"{sys.executable} -c").replace("from safetensors.torch import", "from stub import")
    (tmp_path / "stub.py").write_text("save_file = lambda arrays, path: open(path, 'w').close()\n")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert (adapter / "adapter_model.safetensors").is_file()


def _without(name: str) -> Callable[[Path], None]:
    return lambda adapter: (adapter / name).unlink()


def _cut(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_without("adapter_config.json"), "adapter_config.json is missing"),
        (_without("adapter_model.safetensors"), "adapter_model.safetensors is missing"),
        (_cut, "cannot be read as weights"),
        (lambda adapter: (adapter / "adapter_config.json").write_text("[1]"), "it holds a list. Expected an object"),
        (lambda adapter: (adapter / "adapter_config.json").write_text("{"), "is no config of PEFT's: "),
    ],
)
def test_a_directory_that_is_not_whole_is_refused(
    tiny_model: Path, tmp_path: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    adapter = theirs(tmp_path, pair(QUERY))
    spoil(adapter)
    with pytest.raises(UserError, match=reason):
        read_peft(adapter, tiny_model)


def test_dora_is_refused_on_embeddings_and_on_quantised_layers(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama_untied"]
    ours = adapter_of(base, tmp_path / "ours", fine_tune_type="dora", lora_keys=("model.embed_tokens", "self_attn.q_proj"))
    with pytest.raises(UserError, match=r"PEFT cannot express the DoRA adapter of model\.embed_tokens"):
        write_peft(ours, base, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
    name = "model.layers.1.self_attn.q_proj"
    adapter = theirs(tmp_path / "dora", {**pair(name, 64, 64), f"{name}.lora_magnitude_vector": drawn(64)}, use_dora=True)
    read_peft(adapter, base)
    with pytest.raises(UserError, match="magnitudes of the weights before they were quantised"):
        read_peft(adapter, quantized_model(base, QuantizationSettings(4, 64)))


def test_a_quantised_base_takes_lora_both_ways_and_a_warning_says_what_that_means(
    bases: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = quantized_model(bases["llama_untied"], QuantizationSettings(4, 64))
    ours = adapter_of(base, tmp_path / "ours", lora_keys=("self_attn.q_proj", "lm_head"))
    with caplog.at_level(logging.WARNING):
        out = write_peft(ours, base, tmp_path / "theirs", base_name="someone/llama")
    assert "is quantised" in caplog.text
    np.testing.assert_allclose(logits(base, as_mlx_adapter(out, base, tmp_path / "cache")), logits(base, ours), atol=1e-6)


def test_what_cannot_be_written_is_refused_before_anything_is(bases: dict[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    ours = adapter_of(tiny_model, tmp_path / "ours", lora_keys=("self_attn.q_proj",))
    full = adapter_of(tiny_model, tmp_path / "full", fine_tune_type="full")
    file = tmp_path / "file"
    file.write_text("")
    refused = [
        (full, tiny_model, tmp_path / "out", "full fine-tune, which PEFT has no layout for. Use the run's whole model"),
        (ours, tiny_model, file, "is a file"),
        (ours, tiny_model, ours, "whose config PEFT's would replace"),
        (ours, bases["llama_untied"], tmp_path / "out", r"q_proj has matrices \(32, 4\) and \(4, 32\) for a layer \(64, 64\)"),
        (ours, bases["gpt2"], tmp_path / "out", "q_proj is no layer that its config reaches"),
        (theirs(tmp_path / "theirs", pair(QUERY)), tiny_model, tmp_path / "out", "is in PEFT's layout already"),
        (tmp_path / "nowhere", tiny_model, tmp_path / "out", "there is no such directory"),
    ]
    for adapter, base, out, reason in refused:
        with pytest.raises(UserError, match=reason):
            write_peft(adapter, base, out)
    weights = load_file(ours / "adapters.safetensors")
    save_file({name: each for name, each in weights.items() if "layers.0" not in name}, ours / "adapters.safetensors")
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj has no adapter"):
        write_peft(ours, tiny_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_architecture_that_is_not_known_is_taken_where_its_checkpoint_shows_the_names(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_names, "SAME_NAMES", frozenset())
    ours = adapter_of(tiny_model, tmp_path / "ours", lora_keys=("self_attn.q_proj",))
    out = write_peft(ours, tiny_model, tmp_path / "theirs")
    assert f"{PREFIX}{QUERY}.lora_A.weight" in load_file(out / "adapter_model.safetensors")
    converted = tmp_path / "converted"
    shutil.copytree(tiny_model, converted)
    save_file(load_file(tiny_model / "model.safetensors"), converted / "model.safetensors", {"format": "mlx"})
    for refused in (lambda: write_peft(ours, converted, tmp_path / "other"), lambda: read_peft(out, converted)):
        with pytest.raises(UserError, match=r"What transformers calls the layer .*q_proj .* is not known here: .* 'llama'"):
            refused()


def test_the_base_model_has_the_name_of_the_hub_where_it_has_one(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--Some-Model-1B" / "snapshots" / "0a1b"
    assert base_name_of(snapshot, {"model": "elsewhere"}) == "someone/Some-Model-1B"
    assert base_name_of(tmp_path, {"model": "someone/model"}) == "someone/model"
    assert base_name_of(tmp_path, {"model": "smollm2-135m-instruct"}) == str(tmp_path)
    assert base_name_of(tmp_path, {"model": "../models/mine"}) == str(tmp_path)
    assert base_name_of(tmp_path, {}) == str(tmp_path)


def test_a_peft_adapter_is_known_by_its_config_and_without_one_by_its_files(tiny_model: Path, tmp_path: Path) -> None:
    adapter = theirs(tmp_path / "theirs", pair(QUERY))
    ours = adapter_of(tiny_model, tmp_path / "ours", lora_keys=("self_attn.q_proj",))
    assert is_peft(adapter) and not is_peft(ours) and not is_peft(tmp_path) and not is_peft(tmp_path / "nowhere")
    assert in_mlx_layout(ours, tiny_model) == ours
    assert in_mlx_layout(adapter, tiny_model) == in_mlx_layout(adapter, tiny_model) != adapter
    (adapter / "adapter_config.json").unlink()
    assert is_peft(adapter)
    shutil.copyfile(adapter / "adapter_model.safetensors", ours / "adapter_model.safetensors")
    assert not is_peft(ours)


def test_it_is_converted_once_for_its_content_and_its_base(tiny_model: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter, cache = theirs(tmp_path / "here" / "one", pair(QUERY)), tmp_path / "cache"
    first = as_mlx_adapter(adapter, tiny_model, cache)
    before = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    shutil.copytree(adapter, tmp_path / "there" / "one")
    assert as_mlx_adapter(tmp_path / "there" / "one", tiny_model, cache) == first
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == before
    (first / "adapter_config.json").unlink()  # as a run that was stopped leaves it
    assert check_adapter(as_mlx_adapter(adapter, tiny_model, cache))["lora_parameters"]["rank"] == 4
    assert as_mlx_adapter(theirs(adapter, pair(QUERY), lora_alpha=9), tiny_model, cache) != first


def test_what_the_fit_has_seen_goes_along_both_ways(tiny_model: Path, tmp_path: Path) -> None:
    ours = adapter_of(tiny_model, tmp_path / "ours", lora_keys=("self_attn.q_proj",))
    (ours / "used_inputs.txt").write_text("abc\n")
    out = write_peft(ours, tiny_model, tmp_path / "theirs")
    back = as_mlx_adapter(out, tiny_model, tmp_path / "cache")
    assert (out / "used_inputs.txt").read_text() == (back / "used_inputs.txt").read_text() == "abc\n"
