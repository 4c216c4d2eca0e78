from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load

from finetune_dataflow.engine import training
from finetune_dataflow.engine.methods import make_trainable, trainable
from finetune_dataflow.engine.model_directories import complete_model, quantized_model
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.settings import QuantizationSettings
from finetune_dataflow.engine.starting_weights import read_weights
from finetune_dataflow.engine.tokens import TokenColumns
from finetune_dataflow.errors import UserError
from tests.architectures import write_architecture
from tests.fit_values import history, rows_of, settings_of

ASKED_FOR = ("mistral", "llama", "phi", "mixtral", "qwen2", "gemma", "olmo2")
SHORT = {"epochs": None, "iters": 6, "evals_per_epoch": 1, "learning_rate": 0.02, "optimizer": "adam", "weight_decay": None}


@pytest.fixture(scope="module")
def rows() -> TokenColumns:
    return rows_of(12, 1)


@pytest.fixture(scope="module")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("architectures")
    return {name: write_architecture(directory / name, name, layers=2) for name in ASKED_FOR}


def logits(model: object, rows: TokenColumns) -> mx.array:
    return model(mx.array([rows.row_ids(0).tolist()]))  # type: ignore[operator]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", ASKED_FOR)
def test_each_architecture_is_fitted_saved_and_reloaded_by_mlx_lm(
    architectures: dict[str, Path], rows: TokenColumns, name: str, method: str, tmp_path: Path
) -> None:
    settings = settings_of(**SHORT, fine_tune_type=method, num_layers=-1)
    summary = training.fit(architectures[name], rows, rows, settings, tmp_path, {"model": str(architectures[name])})
    assert summary.best_validation_loss < summary.first_validation_loss
    adapter = tmp_path / "adapters"
    theirs = load(str(architectures[name]), adapter_path=str(adapter))[0]
    ours, base = load_model(architectures[name], adapter), load_model(architectures[name])
    assert mx.array_equal(logits(theirs, rows), logits(ours, rows))
    assert not mx.allclose(logits(base, rows), logits(ours, rows), atol=1e-4)
    if method == "full":
        whole = load(str(complete_model(architectures[name], adapter, tmp_path / "model")))[0]
        assert mx.array_equal(logits(whole, rows), logits(ours, rows))


@pytest.mark.parametrize(("bits", "method"), [(4, "lora"), (8, "lora"), (4, "dora")])
def test_a_model_is_quantised_on_loading_and_its_adapter_is_trained_and_reloaded(
    architectures: dict[str, Path], rows: TokenColumns, bits: int, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_DATAFLOW_CACHE", str(tmp_path / "cache"))
    base = quantized_model(architectures["llama"], QuantizationSettings(bits, 32))
    assert base == quantized_model(architectures["llama"], QuantizationSettings(bits, 32)) != architectures["llama"]
    size = (base / "model.safetensors").stat().st_size
    assert size < 0.75 * (architectures["llama"] / "model.safetensors").stat().st_size
    settings = settings_of(**SHORT, fine_tune_type=method)
    summary = training.fit(base, rows, rows, settings, tmp_path / "run", {})
    assert summary.best_validation_loss < summary.first_validation_loss
    theirs = load(str(base), adapter_path=str(tmp_path / "run" / "adapters"))[0]
    assert mx.array_equal(logits(theirs, rows), logits(load_model(base, tmp_path / "run" / "adapters"), rows))


def test_quantising_again_or_in_groups_that_fit_no_layer_is_refused(
    tiny_model: Path, architectures: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_DATAFLOW_CACHE", str(tmp_path))
    base = quantized_model(architectures["llama"], QuantizationSettings(4, 64))
    with pytest.raises(UserError, match="quantised already"):
        quantized_model(base, QuantizationSettings(8, 64))
    with pytest.raises(UserError, match="quantize_group_size=128: no layer"):
        quantized_model(tiny_model, QuantizationSettings(4, 128))
    with pytest.raises(UserError, match=r"quantize_bits=5 is out of range\. Expected 4 or 8"):
        QuantizationSettings(5, 64)
    with pytest.raises(UserError, match="cannot train quantised weights"):
        make_trainable(load_model(base), settings_of(fine_tune_type="full").method)


def test_lora_keys_reach_the_embeddings_and_the_head(architectures: dict[str, Path], rows: TokenColumns, tmp_path: Path) -> None:
    untied = write_architecture(tmp_path / "untied", "llama_untied", layers=2)
    keys = ("self_attn.q_proj", "model.embed_tokens", "lm_head")
    settings = settings_of(**SHORT, lora_keys=keys, num_layers=1)
    training.fit(untied, rows, rows, settings, tmp_path / "run", {})
    weights = read_weights(tmp_path / "run" / "adapters" / "adapters.safetensors")
    assert {name.rpartition(".")[0] for name in weights} == {
        "model.layers.1.self_attn.q_proj", "model.embed_tokens", "lm_head"
    }  # fmt: skip
    theirs = load(str(untied), adapter_path=str(tmp_path / "run" / "adapters"))[0]
    assert mx.array_equal(logits(theirs, rows), logits(load_model(untied, tmp_path / "run" / "adapters"), rows))


def test_the_embedding_of_a_tied_model_is_trained_at_both_ends(tiny_model: Path, rows: TokenColumns, tmp_path: Path) -> None:
    settings = settings_of(**SHORT, lora_keys=("model.embed_tokens",))
    summary = training.fit(tiny_model, rows, rows, settings, tmp_path, {})
    assert summary.best_validation_loss < summary.first_validation_loss
    theirs = load(str(tiny_model), adapter_path=str(tmp_path / "adapters"))[0]
    assert mx.array_equal(logits(theirs, rows), logits(load_model(tiny_model, tmp_path / "adapters"), rows))


def test_keys_that_match_no_module_or_one_that_takes_no_adapter_are_refused_all_at_once(tiny_model: Path) -> None:
    settings = settings_of(lora_keys=("self_attn.q_prj", "input_layernorm", "self_attn.v_proj")).method
    with pytest.raises(UserError) as caught:
        make_trainable(load_model(tiny_model), settings)
    assert str(caught.value).splitlines() == [
        "lora_keys names 'self_attn.q_prj', which is no module of this model's blocks or of the model. "
        "Did you mean 'self_attn.q_proj'?",
        "lora_keys names 'input_layernorm', a RMSNorm, which takes no adapter.",
    ]


def test_dora_on_experts_is_refused_with_the_modules_that_it_works_on(architectures: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"not possible on the experts .*switch_mlp.* Name other modules .*self_attn\.q_proj"):
        make_trainable(load_model(architectures["mixtral"]), settings_of(fine_tune_type="dora").method)
    keys = ("self_attn.q_proj", "self_attn.v_proj")
    model = load_model(architectures["mixtral"])
    make_trainable(model, settings_of(fine_tune_type="dora", lora_keys=keys).method)
    assert {name.rpartition(".")[2] for name in trainable(model)} == {"lora_a", "lora_b", "m"}


def test_lora_keys_beside_a_full_fine_tune_are_refused(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="lora_keys is for lora and dora"):
        make_trainable(load_model(tiny_model), settings_of(fine_tune_type="full", lora_keys=("self_attn.q_proj",)).method)


def test_a_full_fine_tune_trains_the_last_blocks_or_with_minus_one_everything(tiny_model: Path) -> None:
    model = load_model(tiny_model)
    make_trainable(model, settings_of(fine_tune_type="full", num_layers=1).method)
    assert all(name.startswith("model.layers.1.") for name in trainable(model))
    make_trainable(model, settings_of(fine_tune_type="full", num_layers=-1).method)
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"} <= trainable(model).keys()


def test_rslora_scales_by_the_root_of_the_rank_and_mlx_lm_reads_it(tiny_model: Path, rows: TokenColumns, tmp_path: Path) -> None:
    assert settings_of(lora_rank=16, lora_scale=2.0, use_rslora=True).method.effective_scale == 8.0
    settings = settings_of(**SHORT, lora_rank=4, lora_scale=3.0, use_rslora=True)
    training.fit(tiny_model, rows, rows, settings, tmp_path, {})
    theirs = load(str(tiny_model), adapter_path=str(tmp_path / "adapters"))[0]
    assert theirs.model.layers[0].self_attn.q_proj.scale == 6.0
    assert mx.array_equal(logits(theirs, rows), logits(load_model(tiny_model, tmp_path / "adapters"), rows))


def test_loraplus_trains_the_second_matrix_faster(tiny_model: Path, rows: TokenColumns, tmp_path: Path) -> None:
    """Under plain gradient descent the first update of lora_b is the ratio times as long; lora_a's gradient is zero then."""
    moved = {}
    for ratio in (1.0, 16.0):
        settings = settings_of(epochs=None, iters=1, optimizer="sgd", weight_decay=None, loraplus_lr_ratio=ratio)
        training.fit(tiny_model, rows, rows, settings, tmp_path / str(ratio), {})
        weights = read_weights(tmp_path / str(ratio) / "adapters-last" / "adapters.safetensors")
        moved[ratio] = np.array(weights["model.layers.1.mlp.up_proj.lora_b"])
    assert moved[16.0] == pytest.approx(16 * moved[1.0], rel=1e-5) and abs(moved[1.0]).max() > 0


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "adafactor", "muon", "lion"])
def test_every_optimiser_lowers_the_loss(tiny_model: Path, rows: TokenColumns, optimizer: str, tmp_path: Path) -> None:
    rate = {"sgd": 0.3, "lion": 0.003}.get(optimizer, 0.02)
    settings = settings_of(epochs=6.0, optimizer=optimizer, learning_rate=rate, weight_decay=None, max_grad_norm=1.0)
    summary = training.fit(tiny_model, rows, rows, settings, tmp_path, {})
    assert summary.best_validation_loss < 0.95 * summary.first_validation_loss
    assert all(each["gradient_norm"] > 0 for each in history(tmp_path, "train"))
