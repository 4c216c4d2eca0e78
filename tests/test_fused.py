from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load
from numpy.typing import NDArray
from safetensors import safe_open

from finetune_dataflow.engine import adapters, formats
from finetune_dataflow.engine.chat import load_encoder
from finetune_dataflow.engine.files import fingerprint
from finetune_dataflow.engine.fit_settings import MethodSettings
from finetune_dataflow.engine.fused import FusedReport, LayerSurvival, fuse
from finetune_dataflow.engine.fused_weights import eight_bits
from finetune_dataflow.engine.methods import adapter_config, make_trainable
from finetune_dataflow.engine.model_directories import quantized_model
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.settings import QuantizationSettings
from finetune_dataflow.errors import UserError
from tests.architectures import write_architecture
from tests.tiny_model import IM_START

IDS = [1, 50, 60, 70, 100, 258, 2, 3, 65, 66, 200, 80]
QUERY = "model.layers.1.self_attn.q_proj.weight"
NAMES = ("llama_untied", "qwen2", "gemma2", "phi3", "mixtral", "gemma4_text")
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"fine_tune_type": "dora"},
    "full": {"fine_tune_type": "full", "num_layers": 1},
    "embedding": {"lora_keys": ("model.embed_tokens", "self_attn.q_proj")},
    "embedding_dora": {"lora_keys": ("model.embed_tokens", "self_attn.q_proj"), "fine_tune_type": "dora"},
    "head": {"lora_keys": ("lm_head",)},
}


def write_adapter(base: Path, directory: Path, strength: float = 0.05, **settings: Any) -> Path:
    """A random adapter, as mlx-lm lays it out; strength: how far its second factors, or the trained weights, are from none."""
    method = MethodSettings(**{"num_layers": -1, "lora_rank": 4, "lora_scale": 2.0, **settings})
    model = load_model(base)
    make_trainable(model, method)
    mx.random.seed(5)
    trained = cast(list[tuple[str, mx.array]], tree_flatten(model.trainable_parameters()))
    full = method.fine_tune_type == "full"
    moved = [(name, value + strength * mx.random.normal(value.shape)) for name, value in trained if full or "lora_b" in name]
    model.load_weights(moved, strict=False)
    directory.mkdir(parents=True)
    adapters.save_weights(model, directory)
    adapters.save_config(directory, {**adapter_config(method, len(model.layers)), "model": str(base)})
    return directory


def in_type(base: Path, dtype: mx.Dtype) -> Path:
    """The model with its weights rounded to a type."""
    path = base / "model.safetensors"
    weights = {name: weight.astype(dtype) for name, weight in cast(dict[str, mx.array], mx.load(str(path))).items()}
    mx.eval(weights)
    mx.save_safetensors(str(path), weights, {"format": "pt"})
    return base


def logits(directory: Path, adapter: Path | None = None) -> NDArray[Any]:
    return np.array(load_model(directory, adapter)(mx.array([IDS])))[0]


def arrays(directory: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for path in directory.glob("model*.safetensors"):
        found |= cast(dict[str, mx.array], mx.load(str(path)))
    return found


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: write_architecture(root / name, name, layers=2) for name in (*NAMES, "llama")}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of bfloat16 at 4 bits, quantised as mlx-lm does it."""
    root = tmp_path_factory.mktemp("quantized")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune_dataflow.engine.model_directories.user_cache_directory", lambda: root / "cache")
        patch.setattr("finetune_dataflow.engine.model_source.user_cache_directory", lambda: root / "cache")
        base = in_type(write_architecture(root / "base", "llama", layers=2), mx.bfloat16)
        return quantized_model(base, QuantizationSettings(4, 32))


@pytest.mark.parametrize("method", METHODS)
def test_the_fused_model_answers_as_base_and_adapter_do(bases: dict[str, Path], tmp_path: Path, method: str) -> None:
    base = bases["llama_untied"]
    adapter = write_adapter(base, tmp_path / "adapter", **METHODS[method])
    report = fuse(base, adapter, tmp_path / "fused")
    np.testing.assert_allclose(logits(tmp_path / "fused"), logits(base, adapter), atol=1e-5)
    assert np.abs(logits(base) - logits(base, adapter)).max() > 0.05
    assert report.directory == tmp_path / "fused"
    assert all(each.share == pytest.approx(1, abs=1e-4) for each in report.layers)
    assert arrays(base).keys() == arrays(tmp_path / "fused").keys()


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_answers_as_base_and_adapter_do(
    bases: dict[str, Path], tmp_path: Path, name: str, method: str
) -> None:
    adapter = write_adapter(bases[name], tmp_path / "adapter", **METHODS[method])
    fuse(bases[name], adapter, tmp_path / "fused")
    np.testing.assert_allclose(logits(tmp_path / "fused"), logits(bases[name], adapter), atol=2e-5)


@pytest.mark.parametrize("method", ["embedding", "embedding_dora"])
def test_an_adapted_embedding_that_is_the_head_too_is_merged_once_for_both(
    bases: dict[str, Path], tmp_path: Path, method: str
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in bases["llama"].iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    weights = arrays(bases["llama"])
    copy = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}  # as many checkpoints have it
    mx.save_safetensors(str(base / "model.safetensors"), copy, {"format": "pt"})
    adapter = write_adapter(base, tmp_path / "adapter", **METHODS[method])
    fuse(base, adapter, tmp_path / "fused")
    np.testing.assert_allclose(logits(tmp_path / "fused"), logits(base, adapter), atol=1e-5)
    assert "lm_head.weight" not in arrays(tmp_path / "fused")


def test_a_merged_weight_is_the_sum_worked_out_apart(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    adapter = write_adapter(base, tmp_path / "adapter", use_rslora=True)
    fuse(base, adapter, tmp_path / "fused")
    factors = {name: np.array(value, dtype=np.float64) for name, value in mx.load(str(adapter / adapters.WEIGHTS)).items()}  # type: ignore[union-attr]
    before, after = (np.array(arrays(each)[QUERY], dtype=np.float64) for each in (base, tmp_path / "fused"))
    stem = QUERY.removesuffix(".weight")
    change = (2.0 * 4**0.5) * (factors[f"{stem}.lora_a"] @ factors[f"{stem}.lora_b"]).T
    np.testing.assert_allclose(after - before, change, atol=1e-6)
    untouched = "model.layers.1.input_layernorm.weight"
    assert mx.array_equal(arrays(base)[untouched], arrays(tmp_path / "fused")[untouched])


def test_a_weight_is_rounded_once_to_the_type_of_the_base(bases: dict[str, Path], tmp_path: Path) -> None:
    base = in_type(write_architecture(tmp_path / "base", "llama", layers=2), mx.bfloat16)
    adapter = write_adapter(base, tmp_path / "adapter")
    report = fuse(base, adapter, tmp_path / "fused")
    model = load_model(base, adapter).model.layers[1].self_attn.q_proj
    exact = model.linear.weight + 2.0 * (model.lora_b.T @ model.lora_a.T)
    assert arrays(tmp_path / "fused")[QUERY].dtype == mx.bfloat16
    assert mx.array_equal(arrays(tmp_path / "fused")[QUERY], exact.astype(mx.bfloat16))
    assert {each.stored_as for each in report.layers} == {"bfloat16"}
    assert 0.97 < report.judged[0].share < 1.03


def test_a_change_that_rounding_erases_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    base = in_type(write_architecture(tmp_path / "base", "llama", layers=2), mx.bfloat16)
    adapter = write_adapter(base, tmp_path / "adapter", strength=1e-4)
    with pytest.raises(
        UserError, match=r"14 of 14 weights would keep less than 80% of what was learned, because rounding"
    ) as told:
        fuse(base, adapter, tmp_path / "fused")
    lines = str(told.value).splitlines()
    assert len(lines) == 8  # the five worst
    assert lines[6] == "  and 9 more"
    assert "kept as bfloat16 (the change is" in lines[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_erased_change_is_written_where_that_is_forced_or_allowed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = in_type(write_architecture(tmp_path / "base", "llama", layers=2), mx.bfloat16)
    adapter = write_adapter(base, tmp_path / "adapter", strength=1e-4)
    report = fuse(base, adapter, tmp_path / "fused", force=True)
    assert len(report.below) == 14
    assert "It was written all the same." in caplog.text
    written = json.loads((tmp_path / "fused" / "fusion.json").read_text())
    assert [each["name"] for each in written["layers"]] == [each.name for each in report.layers]
    assert fuse(base, adapter, tmp_path / "fused", threshold=0.0).below == []


def test_shares_are_cosine_times_norm_ratio_and_negligible_layers_are_not_judged() -> None:
    layers = (
        LayerSurvival("a", 0.02, 0.9, 1.0, "bfloat16"),
        LayerSurvival("b", 0.01, 0.8, 0.5, "bfloat16"),
        LayerSurvival("c", 0.0005, 0.0, 0.0, "bfloat16"),
    )
    report = FusedReport(Path("fused"), "as bfloat16", "the base model's", ("mlx-lm",), 0.8, layers)
    assert [(each.name, each.share) for each in report.judged] == [("b", 0.4), ("a", 0.9)]
    assert [each.name for each in report.below] == ["b"]
    assert report.lines()[-1] == "learned change that is kept, at the least: 40.0% in b (asked for: 80%)"


def test_a_quantised_base_is_taken_apart_for_mlx_lm_and_transformers(quantized: Path, tmp_path: Path) -> None:
    adapter = write_adapter(quantized, tmp_path / "adapter")
    report = fuse(quantized, adapter, tmp_path / "fused", quantized="dequantize")
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert not {"quantization", "quantization_config"} & config.keys()
    assert config["torch_dtype"] == "bfloat16"
    assert report.loads_in == ("mlx-lm", "transformers")
    weights = arrays(tmp_path / "fused")
    assert not any(name.endswith((".scales", ".biases")) for name in weights)
    assert {weight.dtype for weight in weights.values()} == {mx.bfloat16}
    np.testing.assert_allclose(logits(tmp_path / "fused"), logits(quantized, adapter), atol=0.05)
    assert np.abs(logits(quantized) - logits(quantized, adapter)).max() > 0.5


def test_a_quantised_base_is_quantised_again_with_the_changed_weights_at_eight_bits(quantized: Path, tmp_path: Path) -> None:
    adapter = write_adapter(quantized, tmp_path / "adapter", lora_keys=("self_attn.q_proj",))
    report = fuse(quantized, adapter, tmp_path / "fused", quantized="requantize")
    settings = json.loads((tmp_path / "fused" / "config.json").read_text())["quantization"]
    changed = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    assert settings == {"group_size": 32, "bits": 4, "mode": "affine"} | {
        path: {"group_size": 32, "bits": 8, "mode": "affine"} for path in changed
    }
    assert [(each.name, each.stored_as) for each in report.layers] == [(f"{path}.weight", "8 bits") for path in changed]
    assert report.loads_in == ("mlx-lm",)
    theirs = load(str(tmp_path / "fused"))[0]
    assert [theirs.model.layers[1].self_attn.q_proj.bits, theirs.model.layers[1].self_attn.k_proj.bits] == [8, 4]
    np.testing.assert_allclose(logits(tmp_path / "fused"), logits(quantized, adapter), atol=0.05)
    before, after = arrays(quantized), arrays(tmp_path / "fused")
    assert all(mx.array_equal(before[name], after[name]) for name in before if "q_proj" not in name)
    assert 0.98 < report.judged[0].share < 1.02


def test_a_change_below_the_steps_of_eight_bits_is_refused(quantized: Path, tmp_path: Path) -> None:
    adapter = write_adapter(quantized, tmp_path / "adapter", strength=1e-4)
    with pytest.raises(
        UserError, match=r"kept as 8 bits.*(\n.*)*Use quantized='dequantize', keep the adapter apart, or force it"
    ):
        fuse(quantized, adapter, tmp_path / "fused", quantized="requantize")


def test_eight_bit_codes_are_the_nearest_to_the_scales_as_they_are_rounded() -> None:
    weight = mx.array(np.random.default_rng(3).normal(size=(4, 64)).astype(np.float32))
    codes, scales, biases = eight_bits(weight, 32, mx.bfloat16)
    kept = mx.dequantize(codes, scales.astype(mx.float32), biases.astype(mx.float32), 32, 8)
    step = np.repeat(np.abs(np.array(scales.astype(mx.float32))), 32, axis=1)
    inside = np.abs(np.array(kept - weight)) <= step * 0.5001
    assert inside.mean() > 0.98  # but for values at the end of the range
    assert (codes.dtype, codes.shape, scales.dtype, biases.shape) == (mx.uint32, (4, 16), mx.bfloat16, (4, 2))


@pytest.mark.parametrize(
    ("name", "names"), [("mixtral", ("w1", "w2", "w3")), ("qwen3_moe", ("gate_proj", "down_proj", "up_proj"))]
)
def test_experts_get_transformers_names_and_a_model_with_these_is_fused_too(
    tmp_path: Path, name: str, names: tuple[str, ...]
) -> None:
    base = write_architecture(tmp_path / "base", name, layers=2)
    first, second = write_adapter(base, tmp_path / "first"), write_adapter(base, tmp_path / "second", strength=0.1)
    fuse(base, first, tmp_path / "fused")
    found = arrays(tmp_path / "fused")
    assert not any("switch_mlp" in each for each in found)
    for expert in range(4):
        for each in names:
            assert sum(f"experts.{expert}.{each}.weight" in weight for weight in found) == 2
    again = fuse(tmp_path / "fused", second, tmp_path / "again")
    assert len(again.layers) == 16
    np.testing.assert_allclose(logits(tmp_path / "again"), logits(tmp_path / "fused", second), atol=1e-5)
    assert arrays(tmp_path / "again").keys() == found.keys()


def test_an_architecture_that_mlx_lm_turns_over_is_refused_with_the_reason(tmp_path: Path) -> None:
    base = write_architecture(tmp_path / "base", "gpt2", layers=2)
    adapter = write_adapter(base, tmp_path / "adapter")
    theirs = {
        name.removeprefix("model."): weight.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else weight
        for name, weight in arrays(base).items()
    }  # as transformers stores GPT-2: inputs before outputs
    mx.eval(theirs)
    mx.save_safetensors(
        str(base / "model.safetensors"), {each: mx.contiguous(value) for each, value in theirs.items()}, {"format": "pt"}
    )
    with pytest.raises(
        UserError, match=r"mlx-lm changes the weight model\.h\.\d\..*\(architecture 'gpt2'\), in a way that cannot"
    ):
        fuse(base, adapter, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_a_weight_that_mlx_lm_only_renames_keeps_its_name(tmp_path: Path) -> None:
    base = write_architecture(tmp_path / "base", "gpt2", layers=2)
    adapter = write_adapter(base, tmp_path / "adapter", lora_keys=("model.wte",))
    weights = {
        name.removeprefix("model."): weight for name, weight in arrays(base).items() if "attn" not in name and "mlp" not in name
    }
    rest = {name: weight for name, weight in arrays(base).items() if "attn" in name or "mlp" in name}
    mx.eval(weights, rest)
    mx.save_safetensors(str(base / "model.safetensors"), {**weights, **rest}, {"format": "pt"})
    fuse(base, adapter, tmp_path / "fused")
    assert arrays(tmp_path / "fused").keys() == {*weights, *rest}
    np.testing.assert_allclose(logits(tmp_path / "fused"), logits(base, adapter), atol=1e-5)


def test_a_base_in_mlx_lms_layout_whose_names_are_not_known_is_refused(tmp_path: Path) -> None:
    base = write_architecture(tmp_path / "base", "mamba2", layers=2)
    mx.save_safetensors(str(base / "model.safetensors"), arrays(base), {"format": "mlx"})
    with pytest.raises(
        UserError, match=r"stored as mlx-lm stores it; how transformers names the weights of the architecture 'mamba2'"
    ):
        fuse(base, write_adapter(base, tmp_path / "adapter"), tmp_path / "fused")


def test_a_base_quantised_by_another_scheme_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    base = write_architecture(tmp_path / "base", "llama", layers=2)
    adapter = write_adapter(base, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "other"}}))
    with pytest.raises(UserError, match="is quantised by 'other', which cannot be taken apart here"):
        fuse(base, adapter, tmp_path / "fused")


def test_an_adapter_with_layers_that_the_base_lacks_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    deeper = write_architecture(tmp_path / "deeper", "llama", layers=3)
    adapter = write_adapter(deeper, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"does not fit the model in .*llama; it was made for .*deeper.*model\.layers\.2"):
        fuse(bases["llama"], adapter, tmp_path / "fused")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "deeper"]


def test_an_adapter_that_is_not_finite_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = write_adapter(bases["llama"], tmp_path / "adapter", strength=float("inf"))
    with pytest.raises(UserError, match=r"tuned weight model\.layers\.\d\..* has values that are not finite as float32"):
        fuse(bases["llama"], adapter, tmp_path / "fused")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_that_changes_nothing_is_fused(tmp_path: Path, method: str) -> None:
    base = in_type(write_architecture(tmp_path / "base", "llama", layers=2), mx.bfloat16)
    adapter = write_adapter(base, tmp_path / "adapter", strength=0.0, fine_tune_type=method)
    report = fuse(base, adapter, tmp_path / "fused")
    assert {(each.relative_change, each.share) for each in report.layers} == {(0.0, 1.0)}
    np.testing.assert_array_equal(logits(tmp_path / "fused"), logits(base))


def test_several_files_have_an_index_and_one_has_none(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = write_adapter(bases["llama"], tmp_path / "adapter")
    fuse(bases["llama"], adapter, tmp_path / "whole")
    fuse(bases["llama"], adapter, tmp_path / "parts", shard_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert sorted({*index["weight_map"].values()}) == files
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in arrays(tmp_path / "whole").values())
    np.testing.assert_array_equal(logits(tmp_path / "parts"), logits(tmp_path / "whole"))
    assert not (tmp_path / "whole" / "model.safetensors.index.json").exists()
    for path in (tmp_path / "parts" / files[0], tmp_path / "whole" / "model.safetensors"):
        with safe_open(path, framework="numpy") as handle:
            assert handle.metadata() == {"format": "pt"}


def test_the_directory_is_complete_for_mlx_lm(bases: dict[str, Path], tmp_path: Path) -> None:
    fuse(bases["llama"], write_adapter(bases["llama"], tmp_path / "adapter"), tmp_path / "fused")
    assert {path.name for path in (tmp_path / "fused").iterdir()} == {
        "config.json", "fusion.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    _, tokenizer = load(str(tmp_path / "fused"))[:2]
    assert tokenizer.encode("Hi", add_special_tokens=False) == [72, 105]


def test_what_was_fused_before_is_replaced_and_anything_else_is_left_alone(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    adapter, other = write_adapter(base, tmp_path / "adapter"), write_adapter(base, tmp_path / "other", strength=0.1)
    fuse(base, adapter, tmp_path / "fused")
    fuse(base, other, tmp_path / "fused")
    np.testing.assert_allclose(logits(tmp_path / "fused"), logits(base, other), atol=1e-5)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match="notes is not empty and holds no model that was fused here"):
        fuse(base, adapter, tmp_path / "notes")
    with pytest.raises(UserError, match="is what is fused"):
        fuse(tmp_path / "fused", adapter, tmp_path / "fused")
    with pytest.raises(UserError, match="is a file"):
        fuse(base, adapter, tmp_path / "notes" / "diary.txt")
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear diary"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "fused", "notes", "other"]


@pytest.mark.parametrize(
    ("options", "said"),
    [({"threshold": 1.5}, "threshold=1.5 is out of range"), ({"quantized": "requantise"}, "quantized='requantise' is unknown")],
)
def test_values_out_of_range_are_named(bases: dict[str, Path], tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        fuse(bases["llama"], tmp_path / "adapter", tmp_path / "fused", **options)


def trained_with(adapter: Path, template: str) -> Path:
    """The adapter, saying that it was trained with a chat template."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "fingerprints": {"chat_template": fingerprint(template)}}))
    return adapter


def test_the_template_of_the_training_becomes_the_tokenizers_own(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    adapter = trained_with(write_adapter(base, tmp_path / "adapter"), formats.FORMATS["vicuna"])
    report = fuse(base, adapter, tmp_path / "fused")
    assert report.chat_template == "vicuna, as in training"
    messages = [{"role": "user", "content": "Hello"}]
    wanted = load_encoder(base, formats.FORMATS["vicuna"])
    assert load_encoder(tmp_path / "fused").prompt_ids(messages) == wanted.prompt_ids(messages)
    assert load_encoder(base).prompt_ids(messages) != wanted.prompt_ids(messages)
    generation = json.loads((tmp_path / "fused" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == sorted(wanted.stop_ids)


def test_the_beginning_that_training_put_before_a_template_is_written_into_it(bases: dict[str, Path], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    base = write_architecture(tmp_path / "base", "llama", layers=2)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", IM_START)]
    )
    tokenizer.save(str(base / "tokenizer.json"))
    adapter = trained_with(write_adapter(base, tmp_path / "adapter"), formats.FORMATS["vicuna"])
    fuse(base, adapter, tmp_path / "fused")
    messages = [{"role": "user", "content": "Hello"}]
    found = load_encoder(tmp_path / "fused").prompt_ids(messages)
    assert found == load_encoder(base, formats.FORMATS["vicuna"]).prompt_ids(messages)
    assert found.count(IM_START) == 1
    assert found[0] == IM_START


def test_the_users_own_template_is_found_through_the_run(bases: dict[str, Path], tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
    (tmp_path / "own.jinja").write_text(template)
    (tmp_path / "config.yaml").write_text(f"prompt_format: {tmp_path / 'own.jinja'}\n")
    adapter = trained_with(write_adapter(bases["llama"], tmp_path / "adapter"), template)
    assert fuse(bases["llama"], adapter, tmp_path / "fused").chat_template == f"{tmp_path / 'own.jinja'}, as in training"
    assert json.loads((tmp_path / "fused" / "tokenizer_config.json").read_text())["chat_template"] == template


def test_a_template_that_is_gone_is_told_and_one_given_is_taken(
    bases: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = trained_with(write_adapter(bases["llama"], tmp_path / "adapter"), "{{ messages[0]['content'] }} gone")
    report = fuse(bases["llama"], adapter, tmp_path / "fused")
    assert report.chat_template == "the base model's; the adapter was trained with another, which was not found"
    assert "was not found; the base model's is kept" in caplog.text
    given = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}given"
    assert fuse(bases["llama"], adapter, tmp_path / "fused", chat_template=given).chat_template == "the one given"
    assert load_encoder(tmp_path / "fused").tokenizer.chat_template == given


def test_the_bases_own_template_is_kept_where_it_was_trained_with(bases: dict[str, Path], tmp_path: Path) -> None:
    own = json.loads((bases["llama"] / "tokenizer_config.json").read_text())["chat_template"]
    adapter = trained_with(write_adapter(bases["llama"], tmp_path / "adapter"), own)
    assert fuse(bases["llama"], adapter, tmp_path / "fused").chat_template == "the base model's, as in training"
    assert not (tmp_path / "fused" / "generation_config.json").exists()
