from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from finetune_dataflow.engine import adapters, gguf_writer
from finetune_dataflow.engine.fit_settings import MethodSettings
from finetune_dataflow.engine.fused import fuse
from finetune_dataflow.engine.gguf import convert_gguf
from finetune_dataflow.engine.gguf_tokenizer import (
    LLAMA3,
    QWEN2,
    TEKKEN,
    add_tokenizer,
    gguf_tokenizer,
    load_tokenizer,
    sentencepiece_ids,
)
from finetune_dataflow.engine.gguf_writer import permuted, write_gguf, write_lora_gguf
from finetune_dataflow.engine.methods import adapter_config, make_trainable
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.errors import UserError
from tests.architectures import write_architecture
from tests.tiny_model import CHATML, byte_tokenizer

IDS = [1, 50, 60, 70, 100, 258, 2, 3, 65, 66, 260, 80]
BYTES, MERGED, CONTROLS = 256, ["t h", "th e", "i n", "Ġ the", "Ġ in"], ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = "the thing in there, in 12 <think> tests"
NAMES = ("llama", "llama_untied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
# Where GGUF has something built in or transformers' reader does not look, the tiny models have it, too.
BUILT_IN: dict[str, dict[str, Any]] = {
    "mistral": {"layer_types": None, "sliding_window": None},
    "qwen3": {"head_dim": 128},
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256, "head_dim": 256},
    "gemma3_text": {"sliding_window_pattern": 6, "query_pre_attn_scalar": 256, "head_dim": 256},
}


def write_model(directory: Path, name: str, **changed: Any) -> Path:
    """A tiny random model of an architecture with a byte-level tokenizer that has merges, saved as a user would have it."""
    import tests.architectures as architectures

    plain = architectures._CONFIGS[name]
    try:
        architectures._CONFIGS[name] = lambda layers, size: {
            **plain(layers, size), "vocab_size": 320, **BUILT_IN.get(name, {}), **changed
        }  # fmt: skip
        write_architecture(directory, name, layers=6 if name == "gemma3_text" else 2)
    finally:
        architectures._CONFIGS[name] = plain
    write_tokenizer(directory, byte_level())
    return directory


def byte_level(pre: Any = None, ignore_merges: bool = False) -> Tokenizer:
    """Byte-level BPE whose first ids are the bytes, then five merged tokens, then three control tokens."""
    alphabet = json.loads(byte_tokenizer().to_str())["model"]["vocab"]
    vocabulary = {**alphabet, **{merge.replace(" ", ""): BYTES + n for n, merge in enumerate(MERGED)}}
    merges = [(left, right) for left, right in (merge.split(" ") for merge in MERGED)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROLS])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def split_by(regex: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def write_tokenizer(directory: Path, tokenizer: Tokenizer, **settings: Any) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))
    plain = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>", "clean_up_tokenization_spaces": False, "chat_template": CHATML,
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps({**plain, **settings}))


def sentencepiece(merges: list[tuple[str, str]], metaspace: bool = False) -> Tokenizer:
    """A tokenizer as those of Llama 2, Mistral and Gemma: bytes for what has no piece, spaces as a character."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", ",", "."]
    pieces += dict.fromkeys(left + right for left, right in merges)
    tokenizer = Tokenizer(
        models.BPE({piece: n for n, piece in enumerate(pieces)}, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>")])
    tokenizer.add_tokens([AddedToken("▁▁▁", special=False, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


OF_LLAMA = [("t", "h"), ("th", "e"), ("t", "he"), ("h", "e"), ("▁", "the"), ("i", "n"), ("▁", "in"), ("in", "g"), ("n", "g")]
SCORED = [("h", "e"), ("t", "h"), ("t", "he"), ("th", "e"), ("▁", "the"), ("i", "n"), ("▁", "in"), ("in", "g")]
UNSCORED = [("u", "i"), ("q", "u"), ("qu", "i")]  # "q" and "ui" are not joined, though "qui" is a piece
OF_SENTENCEPIECE = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "pad_token": None}


def write_adapter(base: Path, directory: Path, **settings: Any) -> Path:
    """A random adapter whose change is far from small, as mlx-lm lays it out."""
    method = MethodSettings(**{"num_layers": -1, "lora_rank": 4, "lora_scale": 2.0, **settings})
    model = load_model(base)
    make_trainable(model, method)
    mx.random.seed(5)
    trained = cast(list[tuple[str, mx.array]], tree_flatten(model.trainable_parameters()))
    full = method.fine_tune_type == "full"
    moved = [(name, value + 0.05 * mx.random.normal(value.shape)) for name, value in trained if full or name.endswith("lora_b")]
    model.load_weights(moved, strict=False)
    directory.mkdir(parents=True)
    adapters.save_weights(model, directory)
    adapters.save_config(directory, {**adapter_config(method, len(model.layers)), "model": str(base)})
    return directory


def changed_weight(model: Path, name: str, weight: mx.array) -> Path:
    """The model, with one weight put in place of another or beside them."""
    weights = cast(dict[str, mx.array], mx.load(str(model / "model.safetensors")))
    mx.eval(weights)
    mx.save_safetensors(str(model / "model.safetensors"), {**weights, name: weight}, {"format": "pt"})
    return model


def logits(directory: Path, adapter: Path | None = None) -> NDArray[Any]:
    return np.array(load_model(directory, adapter)(mx.array([IDS])))[0]


def metadata(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


LEAVES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
OF_GEMMA = {
    "ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
OTHER_LEAVES = {
    "gemma2": OF_GEMMA, "gemma3_text": OF_GEMMA,
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
}  # fmt: skip
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def read_back(path: Path, name: str, config: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """The weights in a GGUF file under transformers' names, by tables of its own."""
    leaves = {**LEAVES, **OTHER_LEAVES.get(name, {})}
    weights = {}
    for tensor in gguf.GGUFReader(path).tensors:
        stem, _, kind = tensor.name.rpartition(".")
        _, _, inside = stem.partition("blk.")
        layer, _, leaf = inside.partition(".")
        theirs = f"model.layers.{layer}.{leaves[leaf]}.{kind}" if inside else f"{OUTSIDE[stem]}.{kind}"
        values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if name.startswith(("llama", "mistral")) and leaf in {"attn_q", "attn_k"}:
            heads = config["num_attention_heads" if leaf == "attn_q" else "num_key_value_heads"]
            size = len(values) // heads
            order = [head * size + (row % 2) * size // 2 + row // 2 for head in range(heads) for row in range(size)]
            unsorted = np.empty_like(values)
            unsorted[order] = values
            values = unsorted
        weights[theirs] = values - 1 if name.startswith("gemma") and theirs.endswith("norm.weight") else values
    return weights


@pytest.fixture(scope="module")
def models_by_name(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, name) for name in NAMES}


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("name", NAMES)
def test_every_weight_comes_back_but_for_the_rounding_of_its_type(
    models_by_name: dict[str, Path], name: str, kind: Any, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    model = models_by_name[name]
    config = json.loads((model / "config.json").read_text())
    found = read_back(write_gguf(model, tmp_path / "model.gguf", kind), name, config)
    original = load_file(model / "model.safetensors")
    assert found.keys() == original.keys()
    for each, weight in original.items():
        if weight.ndim == 1:
            np.testing.assert_allclose(found[each], weight, rtol=0, atol=2e-7, err_msg=each)
        elif kind == "f16":
            np.testing.assert_array_equal(found[each], weight.astype(np.float16).astype(np.float32), err_msg=each)
        else:
            blocks = weight.reshape(-1, 32)
            most = np.abs(blocks).max(axis=1, keepdims=True) / 127
            assert (np.abs(found[each].reshape(-1, 32) - blocks) <= 0.5 * most + 128 * most / 2048).all(), each
    read = load_model(model)
    read.load_weights([(each, mx.array(weight)) for each, weight in found.items()])
    assert np.abs(np.array(read(mx.array([IDS])))[0] - logits(model)).max() < {"f16": 0.05, "q8_0": 1.0}[kind]


def test_our_own_reader_gives_back_model_and_tokenizer(models_by_name: dict[str, Path], tmp_path: Path) -> None:
    model = models_by_name["llama"]
    directory = convert_gguf(write_gguf(model, tmp_path / "model.gguf", "f16"), tmp_path / "model")
    np.testing.assert_allclose(logits(directory), logits(model), atol=5e-3)
    there, here = load_tokenizer(directory), load_tokenizer(model)
    assert there.encode(WORDS) == here.encode(WORDS) == [*there.encode("the"), *there.encode(WORDS[3:])]
    assert there.chat_template == here.chat_template
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == 263


def test_the_metadata_of_a_llama_are_those_that_llama_cpp_reads(models_by_name: dict[str, Path], tmp_path: Path) -> None:
    found = metadata(write_gguf(models_by_name["llama_untied"], tmp_path / "my-model.gguf", "q8_0"))
    assert {name: value for name, value in found.items() if not name.startswith(("GGUF.", "tokenizer."))} == {
        "general.architecture": "llama", "general.type": "model", "general.name": "my-model", "general.file_type": 7,
        "general.quantization_version": 2, "llama.block_count": 2, "llama.context_length": 512, "llama.embedding_length": 64,
        "llama.feed_forward_length": 128, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16, "llama.attention.value_length": 16, "llama.rope.dimension_count": 16,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5), "llama.vocab_size": 320, "llama.rope.freq_base": 10000.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gemma2", {"gemma2.attn_logit_softcapping": 50.0, "gemma2.final_logit_softcapping": 30.0,
                    "gemma2.attention.sliding_window": 4096, "gemma2.attention.key_length": 256}),
        ("gemma3_text", {"gemma3.attention.sliding_window": 8, "gemma3.rope.freq_base_swa": 10000.0}),
        ("phi3", {"phi3.rope.scaling.original_context_length": 512, "phi3.attention.sliding_window": 0}),
        ("qwen3", {"qwen3.attention.key_length": 128, "qwen3.attention.value_length": 128}),
    ],
)  # fmt: skip
def test_what_other_architectures_need_is_in_the_metadata(
    models_by_name: dict[str, Path], name: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    found = metadata(write_gguf(models_by_name[name], tmp_path / "model.gguf", "f16"))
    assert {key: found[key] for key in expected} == expected


def test_linear_scaling_of_the_rotary_embedding_is_named(tmp_path: Path) -> None:
    scaled = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}, "rope_theta": None}
    found = metadata(write_gguf(write_model(tmp_path / "model", "llama", **scaled), tmp_path / "model.gguf", "f16"))
    names = ("scaling.type", "scaling.factor", "freq_base")
    assert [found[f"llama.rope.{name}"] for name in names] == ["linear", 4.0, 5000.0]


def test_llama_3s_scaling_becomes_a_tensor_of_factors(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    model = write_model(tmp_path / "model", "llama", rope_scaling=scaling)
    tensors = {each.name: each for each in gguf.GGUFReader(write_gguf(model, tmp_path / "model.gguf", "q8_0")).tensors}
    factors = tensors["rope_freqs.weight"]
    assert factors.tensor_type == gguf.GGMLQuantizationType.F32
    expected = []
    for place in range(8):  # by the paper's wavelengths
        wavelength = 2 * math.pi * 10000 ** (place / 8)
        smooth = (64 / wavelength - 1) / 3
        expected.append(1 if wavelength < 16 else 8 if wavelength > 64 else 1 / ((1 - smooth) / 8 + smooth))
    assert 1 < expected[1] < 8
    np.testing.assert_allclose(factors.data, expected, rtol=1e-6)


def test_rows_that_are_no_multiple_of_a_block_stay_half_precision(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama", intermediate_size=72)
    tensors = {
        each.name: each.tensor_type.name for each in gguf.GGUFReader(write_gguf(model, tmp_path / "m.gguf", "q8_0")).tensors
    }
    assert (tensors["blk.0.ffn_down.weight"], tensors["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")
    assert (tensors["blk.0.ffn_norm.weight"], tensors["token_embd.weight"]) == ("F32", "Q8_0")


def test_rotated_pairs_are_put_beside_each_other() -> None:
    rows = np.arange(16).reshape(8, 2)[:, :1] // 2
    assert permuted(rows, heads=2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_tokens_have_their_types_and_rows_without_one_are_filled_up(models_by_name: dict[str, Path]) -> None:
    tokenizer = gguf_tokenizer(models_by_name["phi3"], 320)
    assert (tokenizer.model, tokenizer.pre, len(tokenizer.tokens)) == ("gpt2", "gpt-2", 320)
    assert list(zip(tokenizer.tokens, tokenizer.types, strict=True))[259:267] == [
        ("Ġthe", 1), ("Ġin", 1), ("<|endoftext|>", 3), ("<|im_start|>", 3), ("<|im_end|>", 3), ("<think>", 4), ("[PAD265]", 5),
        ("[PAD266]", 5),
    ]  # fmt: skip
    assert tokenizer.merges == ["t h", "th e", "i n", "Ġ the", "Ġ in"]
    assert tokenizer.special_ids == {"bos": 261, "eos": 263, "pad": 261, "eot": 263}
    assert (tokenizer.add_bos, tokenizer.add_eos, tokenizer.chat_template) == (False, False, CHATML)


@pytest.mark.parametrize(
    ("pre", "ignore_merges", "rule"),
    [
        (None, False, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                  pre_tokenizers.ByteLevel(add_prefix_space=False)]), False, "smollm"),
        (split_by(QWEN2), False, "qwen2"),
        (split_by(LLAMA3), True, "llama-bpe"),
        (split_by(LLAMA3), False, "smaug-bpe"),
        (split_by(TEKKEN), True, "tekken"),
    ],
)  # fmt: skip
def test_a_known_splitting_rule_is_named(tmp_path: Path, pre: Any, ignore_merges: bool, rule: str) -> None:
    model = write_model(tmp_path / "model", "llama")
    write_tokenizer(model, byte_level(pre, ignore_merges))
    assert gguf_tokenizer(model, 320).pre == rule


def test_the_rules_are_those_that_transformers_reads_under_the_same_names() -> None:
    theirs = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping").GGUF_PRE_TOKENIZER_SPLITS
    from finetune_dataflow.engine.gguf_tokenizer import GPT_4O

    ours = {"llama-bpe": LLAMA3, "smaug-bpe": LLAMA3, "qwen2": QWEN2, "tekken": TEKKEN, "gpt-4o": GPT_4O}
    assert {name: theirs[name] for name in ours} == ours


@pytest.mark.parametrize("pre", [split_by(r"\w+|\W+"), pre_tokenizers.ByteLevel(add_prefix_space=True)])
def test_an_unknown_splitting_rule_is_refused_and_nothing_is_written(tmp_path: Path, pre: Any) -> None:
    model = write_model(tmp_path / "model", "llama")
    write_tokenizer(model, byte_level(pre))
    with pytest.raises(
        UserError, match=r"splits texts by a rule that no known family has: .*known here: gpt-2, gpt-4o, llama-bpe"
    ):
        write_gguf(model, tmp_path / "model.gguf", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_normaliser_that_gguf_has_no_word_for_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    write_tokenizer(model, tokenizer)
    with pytest.raises(UserError, match="normalises texts by Lowercase"):
        gguf_tokenizer(model, 320)


def test_a_vocabulary_that_was_written_in_another_order_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reversed_tokens(writer: Any, tokenizer: Any) -> None:
        add_tokenizer(writer, replace(tokenizer, tokens=tokenizer.tokens[::-1]))

    model = write_model(tmp_path / "model", "llama")
    monkeypatch.setattr(gguf_writer, "add_tokenizer", reversed_tokens)
    with pytest.raises(RuntimeError, match="does not hold what was written into it"):
        write_gguf(model, tmp_path / "model.gguf", "f16")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(("template", "added"), [("{{ bos_token }}" + CHATML, True), (CHATML, False), (None, True)])
def test_a_beginning_that_the_tokenizer_adds_is_added_by_the_reader_where_training_had_it(
    tmp_path: Path, template: str | None, added: bool
) -> None:
    model = write_model(tmp_path / "model", "llama")
    tokenizer = byte_level()
    tokenizer.post_processor = processors.Sequence(
        [processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 261)])]
    )
    write_tokenizer(model, tokenizer, chat_template=template)
    found = gguf_tokenizer(model, 320)
    assert (found.add_bos, found.add_eos) == (added, False)


@pytest.mark.parametrize(("metaspace", "prefix"), [(False, True), (True, False)])
def test_a_sentencepiece_tokenizer_gets_scores_that_give_the_same_ids(tmp_path: Path, metaspace: bool, prefix: bool) -> None:
    model = write_model(tmp_path / "model", "llama")
    tokenizer = sentencepiece(SCORED, metaspace)
    write_tokenizer(model, tokenizer, **OF_SENTENCEPIECE)
    found = gguf_tokenizer(model, 320)
    assert (found.model, found.pre, found.add_space_prefix, found.add_bos) == ("llama", "default", prefix, False)
    assert found.scores is not None
    scores = {token: score for token, score in zip(found.tokens, found.scores, strict=True) if score > -1e8}
    assert (scores["he"], scores["the"], scores["▁the"]) == (0.0, -2.0, -4.0)
    assert [found.types[found.tokens.index(each)] for each in ("<unk>", "<s>", "<0x41>", "a", "   ")] == [2, 3, 6, 1, 4]
    ids = {token: number for number, token in enumerate(found.tokens)}
    for text in ("the thing in the inn", "Zoë, there", ""):
        assert sentencepiece_ids(text, ids, scores, prefix) == tokenizer.encode(text, add_special_tokens=False).ids, text


def test_an_order_of_merges_that_scores_cannot_give_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    write_tokenizer(model, sentencepiece(UNSCORED), **OF_SENTENCEPIECE)
    with pytest.raises(UserError, match="joins pieces in an order that no scores give"):
        gguf_tokenizer(model, 320)


def test_a_tokenizer_without_merges_is_refused(tmp_path: Path) -> None:
    model = write_architecture(tmp_path / "model", "llama")
    with pytest.raises(UserError, match=r"has no merges, which llama\.cpp needs"):
        write_gguf(model, tmp_path / "model.gguf", "f16")


def test_a_vocabulary_larger_than_the_embedding_is_refused(models_by_name: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="has the token id 264, but the model's embedding has 200 rows"):
        gguf_tokenizer(models_by_name["llama"], 200)


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("olmo2", {}, r"architecture 'olmo2', for which no GGUF is written here\. Expected one of llama, mistral, qwen2"),
        ("mixtral", {}, "architecture 'mixtral'"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rotary embedding is scaled by 'yarn'; known here: none",
        ),
        ("llama", {"hidden_act": "relu"}, "its activation is 'relu'"),
        ("mistral", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}, "see a window of tokens only"),
        ("gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar is 16, where llama.cpp has 256 built in"),
        ("gemma3_text", {"sliding_window_pattern": 3}, "other layers than every 6. see all tokens"),
        ("llama", {"max_position_embeddings": None}, "config.json lacks max_position_embeddings"),
        ("llama", {"quantization": {"bits": 4, "group_size": 64}}, "its weights are quantised, by another scheme"),
    ],
)
def test_what_gguf_cannot_hold_is_refused_with_the_reason(tmp_path: Path, name: str, changed: dict[str, Any], said: str) -> None:
    model = write_model(tmp_path / "model", name)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(UserError, match=said):
        write_gguf(model, tmp_path / "model.gguf", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_without_a_name_are_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "qwen2")
    changed_weight(model, "model.layers.0.self_attn.gate.weight", mx.zeros((4, 4)))
    with pytest.raises(UserError, match=r"no names for in the architecture 'qwen2': model\.layers\.0\.self_attn\.gate\.weight"):
        write_gguf(model, tmp_path / "model.gguf", "f16")


def test_a_weight_too_large_for_half_precision_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    changed_weight(model, "model.layers.1.mlp.up_proj.weight", mx.full((128, 64), 1e5))
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has values that are not finite in half"):
        write_gguf(model, tmp_path / "model.gguf", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("out", ["model", "model.bin", "notes.gguf"])
def test_what_is_no_gguf_file_is_not_written_over(models_by_name: dict[str, Path], tmp_path: Path, out: str) -> None:
    (tmp_path / "notes.gguf").write_text("dear diary")
    with pytest.raises(UserError, match=r"ends in \.gguf|is there and is no GGUF file"):
        write_gguf(models_by_name["llama"], tmp_path / out, "f16")
    assert (tmp_path / "notes.gguf").read_text() == "dear diary"


def test_another_kind_is_refused_by_name(models_by_name: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="kind='q4_0' is unknown"):
        write_gguf(models_by_name["llama"], tmp_path / "model.gguf", "q4_0")  # type: ignore[arg-type]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["llama_untied", "qwen2", "gemma2", "phi3"])
def test_an_adapter_file_changes_the_base_file_as_fusing_does(
    models_by_name: dict[str, Path], tmp_path: Path, name: str, rslora: bool
) -> None:
    keys = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "model.embed_tokens", "lm_head")
    settings = {"lora_keys": keys} if name == "llama_untied" else {}
    base, adapter = models_by_name[name], write_adapter(models_by_name[name], tmp_path / "a", use_rslora=rslora, **settings)
    fuse(base, adapter, tmp_path / "fused")
    plain, tuned = (
        {each.name: gguf.dequantize(each.data, each.tensor_type) for each in gguf.GGUFReader(path).tensors}
        for path in (write_gguf(base, tmp_path / "b.gguf", "f16"), write_gguf(tmp_path / "fused", tmp_path / "f.gguf", "f16"))
    )
    path = write_lora_gguf(adapter, base, tmp_path / "lora.gguf")
    found = metadata(path)
    alpha = 2.0 * 4 * (2 if rslora else 1)
    assert (found["general.type"], found["adapter.type"], found["adapter.lora.alpha"]) == ("adapter", "lora", alpha)
    assert found["general.architecture"] == metadata(tmp_path / "b.gguf")["general.architecture"]
    factors = {each.name: np.array(each.data) for each in gguf.GGUFReader(path).tensors}
    changed = {each.rpartition(".")[0] for each in factors}
    assert changed == {each for each in plain if not np.array_equal(plain[each], tuned[each])}
    assert ("output.weight" in changed) == (name == "llama_untied")
    for each in changed:
        first, second = factors[f"{each}.lora_a"], factors[f"{each}.lora_b"]
        change = (first @ second.T) if each == "token_embd.weight" else second @ first  # llama.cpp flips them for look-ups
        np.testing.assert_allclose(plain[each] + alpha / 4 * change, tuned[each], atol=2e-3, err_msg=each)


def test_an_adapted_embedding_that_is_the_output_head_too_is_refused(models_by_name: dict[str, Path], tmp_path: Path) -> None:
    adapter = write_adapter(models_by_name["llama"], tmp_path / "adapter", lora_keys=("model.embed_tokens",))
    with pytest.raises(UserError, match=r"changes model\.embed_tokens, which is this model's output head, too"):
        write_lora_gguf(adapter, models_by_name["llama"], tmp_path / "lora.gguf")


@pytest.mark.parametrize("method", ["dora", "full"])
def test_an_adapter_that_is_no_lora_is_refused(models_by_name: dict[str, Path], tmp_path: Path, method: str) -> None:
    adapter = write_adapter(models_by_name["llama"], tmp_path / "adapter", fine_tune_type=method)
    with pytest.raises(UserError, match=f"fine_tune_type='{method}'; GGUF knows LoRA only"):
        write_lora_gguf(adapter, models_by_name["llama"], tmp_path / "lora.gguf")


def test_an_adapter_of_another_model_is_refused(models_by_name: dict[str, Path], tmp_path: Path) -> None:
    adapter = write_adapter(models_by_name["gemma3_text"], tmp_path / "adapter")
    with pytest.raises(UserError, match="does not fit the model"):
        write_lora_gguf(adapter, models_by_name["llama"], tmp_path / "lora.gguf")
    assert not (tmp_path / "lora.gguf").exists()


def test_llama_cpp_does_not_take_a_file_called_phi_3_for_microsofts(models_by_name: dict[str, Path], tmp_path: Path) -> None:
    found = metadata(write_gguf(models_by_name["llama"], tmp_path / "as-good-as-phi3.gguf", "f16"))
    assert found["general.name"] == "fine-tuned model"
