"""GGUF files become Hugging Face directories: the numbers, the row order, the tokenizer, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from finetune_dataflow.engine.gguf import convert_gguf, dequantised, is_whole, unfinished_conversions, unpermuted
from finetune_dataflow.errors import UserError

HEADS, KEY_VALUE_HEADS, WIDTH, FEED_FORWARD, LAYERS = 4, 2, 32, 48, 2
CONTROL, NORMAL = 3, 1


def _alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def tiny_weights() -> dict[str, np.ndarray]:
    """A random llama in Hugging Face's names and row order."""
    generator = np.random.default_rng(7)
    vocabulary, key_width = 3 + 256 + 1, KEY_VALUE_HEADS * WIDTH // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (vocabulary, WIDTH),
        "model.norm": (WIDTH,),
        "lm_head": (vocabulary, WIDTH),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm": (WIDTH,),
            f"{prefix}.self_attn.q_proj": (WIDTH, WIDTH),
            f"{prefix}.self_attn.k_proj": (key_width, WIDTH),
            f"{prefix}.self_attn.v_proj": (key_width, WIDTH),
            f"{prefix}.self_attn.o_proj": (WIDTH, WIDTH),
            f"{prefix}.post_attention_layernorm": (WIDTH,),
            f"{prefix}.mlp.gate_proj": (FEED_FORWARD, WIDTH),
            f"{prefix}.mlp.up_proj": (FEED_FORWARD, WIDTH),
            f"{prefix}.mlp.down_proj": (WIDTH, FEED_FORWARD),
        }
    return {f"{name}.weight": generator.normal(scale=0.5, size=shape).astype(np.float32) for name, shape in shapes.items()}


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py does to query and key rows."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write_tiny_gguf(
    path: Path,
    architecture: str = "llama",
    pre_tokenizer: str = "smollm",
    end_of_turn: int | None = None,
    tied: bool = False,
    without: str | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """The model of `tiny_weights` as GGUF, with one merge ("a" + "b"), written by llama.cpp's own writer."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *_alphabet(), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL] * 3 + [NORMAL] * 257)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    if end_of_turn is not None:
        writer.add_eot_token_id(end_of_turn)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, weight in tiny_weights().items():
        if ".q_proj." in name:
            weight = _permuted(weight, HEADS)
        if ".k_proj." in name:
            weight = _permuted(weight, KEY_VALUE_HEADS)
        stored = names.get_name(name, try_suffixes=(".weight",))
        assert stored is not None
        if stored != without and not (tied and stored == "output.weight"):
            writer.add_tensor(stored, weight)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    return convert_gguf(write_tiny_gguf(root / "tiny.gguf"), root / "model")


@pytest.mark.parametrize(
    ("kind", "stored", "expected"),
    [
        # Two's powers are exact in half precision: 0x3800 is 0.5, 0xBC00 is -1, 0x3400 is 0.25, 0xC000 is -2.
        ("F32", "0000803f 000000c0", {0: 1.0, 1: -2.0}),
        ("F16", "003c 00c0", {0: 1.0, 1: -2.0}),
        ("BF16", "803f 4940", {0: 1.0, 1: 3.140625}),
        # 0.5 * (nibble - 8): the low nibbles are values 0 to 15, the high ones 16 to 31.
        ("Q4_0", "0038 1f 78" + " 88" * 14, {0: 3.5, 16: -3.5, 17: -0.5}),
        # 0.5 * nibble - 1.
        ("Q4_1", "0038 00bc 1f 32" + " 22" * 14, {0: 6.5, 16: -0.5, 17: 0.5}),
        # 0.25 * signed byte.
        ("Q8_0", "0034 7f 80" + " 00" * 29 + " ff", {0: 31.75, 1: -32.0, 31: -0.25}),
    ],
)
def test_each_type_dequantises_to_the_numbers_worked_out_by_hand(kind: str, stored: str, expected: dict[int, float]) -> None:
    data = np.frombuffer(bytes.fromhex(stored), dtype=np.uint8).reshape(1, -1)
    values = dequantised("blk.0.attn_q.weight", data, gguf.GGMLQuantizationType[kind])
    wanted = np.zeros((1, 2 if "F" in kind else 32), dtype=np.float32)
    for index, value in expected.items():
        wanted[0, index] = value
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, wanted)


def test_unpermuting_puts_each_heads_even_rows_before_its_odd_rows() -> None:
    stored = np.array([[0], [1], [2], [3], [4], [5], [10], [11], [12], [13], [14], [15]])
    assert unpermuted(stored, heads=2).ravel().tolist() == [0, 2, 4, 1, 3, 5, 10, 12, 14, 11, 13, 15]


def test_every_weight_comes_back_in_hugging_face_name_and_order(tiny_directory: Path) -> None:
    from safetensors.numpy import load_file

    written = load_file(tiny_directory / "model.safetensors")
    original = tiny_weights()
    assert written.keys() == original.keys()
    for name, weight in original.items():
        np.testing.assert_array_equal(written[name], weight, err_msg=name)


def test_mlx_lm_computes_the_logits_of_the_original_weights(tiny_directory: Path) -> None:
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.models import llama

    original = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            intermediate_size=FEED_FORWARD,
            num_attention_heads=HEADS,
            num_key_value_heads=KEY_VALUE_HEADS,
            rms_norm_eps=1e-5,
            vocab_size=260,
            rope_theta=5000.0,
            tie_word_embeddings=False,
        )
    )
    original.load_weights([(name, mx.array(weight)) for name, weight in tiny_weights().items()])
    converted = mlx_lm.load(str(tiny_directory))[0]
    input_ids = mx.array([[1, 50, 60, 70, 259, 2]])
    np.testing.assert_array_equal(np.array(converted(input_ids)), np.array(original(input_ids)))


def test_the_safetensors_mark_lets_transformers_read_the_file(tiny_directory: Path) -> None:
    from safetensors import safe_open

    with safe_open(tiny_directory / "model.safetensors", "numpy") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_transformers_reads_the_configuration_as_the_metadata_gives_it(tiny_directory: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_directory)
    assert (config.model_type, config.hidden_size, config.head_dim) == ("llama", 32, 8)
    assert (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers) == (4, 2, 2)
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 5000.0)
    assert (config.vocab_size, config.max_position_embeddings, config.tie_word_embeddings) == (260, 64, False)


def test_a_file_without_an_output_head_ties_it_to_the_embedding(tmp_path: Path) -> None:
    directory = convert_gguf(write_tiny_gguf(tmp_path / "tied.gguf", tied=True), tmp_path / "tied")
    assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"] is True


def test_generation_ends_at_the_end_of_turn_too_where_it_is_a_token_of_its_own(tmp_path: Path) -> None:
    directory = convert_gguf(write_tiny_gguf(tmp_path / "eot.gguf", end_of_turn=0), tmp_path / "eot")
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


@pytest.mark.parametrize(("pre_tokenizer", "words"), [("smollm", ["ab", "Ġ", "1", "Â½"]), ("gpt-2", ["ab", "Ġ1Â½"])])
def test_the_pre_tokenizer_named_in_the_file_splits_the_text(tmp_path: Path, pre_tokenizer: str, words: list[str]) -> None:
    from transformers import AutoTokenizer

    path = write_tiny_gguf(tmp_path / "tiny.gguf", pre_tokenizer=pre_tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(path, tmp_path / "model"))
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("ab 1½")
    assert [word for word, _ in split] == words


def test_merges_are_applied(tiny_directory: Path) -> None:
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tiny_directory).tokenize("abab ba") == ["ab", "ab", "Ġ", "b", "a"]


def test_control_tokens_are_special(tiny_directory: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_directory)
    ids = tokenizer.encode("<|im_start|>ab<|im_end|>")
    assert ids == [1, 259, 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "other.gguf", architecture="qwen2")
    with pytest.raises(UserError, match=r"other\.gguf.*general\.architecture is 'qwen2'; supported: 'llama'"):
        convert_gguf(path, tmp_path / "model")


def test_another_pre_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "other.gguf", pre_tokenizer="tekken")
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.pre is 'tekken'; supported: 'smollm', 'gpt-2'"):
        convert_gguf(path, tmp_path / "model")


def test_a_tensor_type_without_a_definition_is_refused_with_tensor_and_type(tmp_path: Path) -> None:
    integers = {"blk.1.ffn_up.weight": np.ones((FEED_FORWARD, WIDTH), dtype=np.int32)}
    path = write_tiny_gguf(tmp_path / "integers.gguf", without="blk.1.ffn_up.weight", extra=integers)
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight is stored as I32"):
        convert_gguf(path, tmp_path / "model")
    assert list(tmp_path.iterdir()) == [path]


def test_missing_and_unknown_tensors_are_named_together(tmp_path: Path) -> None:
    bias = {"blk.0.attn_q.bias": np.zeros(WIDTH, dtype=np.float32)}
    path = write_tiny_gguf(tmp_path / "odd.gguf", without="output_norm.weight", extra=bias)
    with pytest.raises(UserError, match=r"missing: output_norm\.weight; not known: blk\.0\.attn_q\.bias"):
        convert_gguf(path, tmp_path / "model")


@pytest.mark.parametrize("kept", [0, 3, 1000, -100])
def test_a_file_cut_short_is_refused(tmp_path: Path, kept: int) -> None:
    path = write_tiny_gguf(tmp_path / "cut.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"cut\.gguf cannot be read as GGUF"):
        convert_gguf(path, tmp_path / "model")


def test_a_directory_with_other_files_is_left_alone(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match="notes is not empty"):
        convert_gguf(path, tmp_path / "notes")
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear diary"


def test_another_models_directory_is_left_alone(tmp_path: Path) -> None:
    directory = convert_gguf(write_tiny_gguf(tmp_path / "one.gguf"), tmp_path / "model")
    with pytest.raises(UserError, match="holds another converted model"):
        convert_gguf(write_tiny_gguf(tmp_path / "two.gguf", tied=True), directory)
    assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_missing_and_a_shortened_file_make_a_directory_not_whole(tmp_path: Path) -> None:
    directory = convert_gguf(write_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "model")
    assert is_whole(directory)
    with (directory / "model.safetensors").open("r+b") as handle:
        handle.truncate(1000)
    assert not is_whole(directory)
    (directory / "model.safetensors").unlink()
    assert not is_whole(directory)


def test_everyone_may_read_the_weights_who_may_read_the_configuration(tiny_directory: Path) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in tiny_directory.iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_a_kill_before_the_end_leaves_no_directory_and_the_next_call_succeeds(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom finetune_dataflow.engine import gguf\n"
        "gguf._rename_onto = lambda *paths: os._exit(9)\n"
        "gguf.convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(path), str(tmp_path / "model")], check=False)
    assert killed.returncode == 9
    assert not (tmp_path / "model").exists()
    assert len(unfinished_conversions(tmp_path / "model")) == 1
    assert is_whole(convert_gguf(path, tmp_path / "model"))


def test_two_processes_that_convert_at_the_same_time_both_succeed(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    # Each waits with its finished conversion until the other's is finished too.
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom finetune_dataflow.engine import gguf\n"
        "rename = gguf._rename_onto\n"
        "def together(finished, directory):\n"
        "    (directory.parent / f'ready-{sys.argv[3]}').touch()\n"
        "    while len(list(directory.parent.glob('ready-*'))) < 2: time.sleep(0.01)\n"
        "    rename(finished, directory)\n"
        "gguf._rename_onto = together\n"
        "gguf.convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(path), str(tmp_path / "model"), name], env=os.environ)
        for name in ("one", "two")
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert is_whole(tmp_path / "model")
    assert unfinished_conversions(tmp_path / "model") == []
