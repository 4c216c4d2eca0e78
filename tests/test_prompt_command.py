"""`run.py prompt` as a user meets it: what stands on standard output, what on standard error, and what is refused."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import pytest
import yaml
from mlx_lm import generate as mlx_lm_generate
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import load as mlx_lm_load

from finetune_dataflow import engine
from finetune_dataflow.cli.options import build_driver
from finetune_dataflow.cli.prompt import HELP, prompt
from finetune_dataflow.cli.prompt_options import OTHER_NAMES, OWN, SHORT
from finetune_dataflow.engine import chat_session
from finetune_dataflow.engine.chat import load_encoder
from finetune_dataflow.engine.colors import legend, plain_text
from finetune_dataflow.engine.replies import StreamedToken
from finetune_dataflow.engine.streaming import SamplingSettings
from finetune_dataflow.errors import UserError
from tests.tiny_model import IM_END, IM_START, chatml_ids, write_tiny_model

Recorded = list[tuple[list[int], SamplingSettings]]
LOOM = """
lang = "en"
[system_prompt]
_ = "Be brief."
[question]
_ = "What is {thing}?"
[ask]
_ = "Tell me: {input}"
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its blocks turned up: as it is, it says one thing over and over."""
    directory = write_tiny_model(tmp_path_factory.mktemp("lively") / "model")
    path = str(directory / "model.safetensors")
    weights = cast(dict[str, mx.array], mx.load(path))
    weights = {name: each * (6 if "proj" in name else 1) for name, each in weights.items()}
    mx.save_safetensors(path, weights, {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def run(model: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the tiny model, with a system prompt of its own."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    inputs = {
        "data_path": str(data_file), "input_text_key": "question", "output_text_key": "reply", "model_id": str(model),
        "output_dir": str(directory), "num_layers": 2, "max_tokens": 8, "iters": 6, "learning_rate": 0.02,
        "system_prompt": "Be kind.",
    }  # fmt: skip
    build_driver("base").execute(["adapter_path", "config_file"], inputs=inputs)
    return directory


@pytest.fixture
def loom(tmp_path: Path) -> Path:
    path = tmp_path / "loom.toml"
    path.write_text(LOOM)
    return path


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """The ids and settings of every prompt that a model is given, which then answers as it would."""
    calls: Recorded = []

    def recording(model: nn.Module, encoder: object, ids: Sequence[int], settings: SamplingSettings) -> Iterator[StreamedToken]:
        calls.append((list(ids), settings))
        return engine.streaming.stream(model, encoder, ids, settings)  # type: ignore[arg-type]

    monkeypatch.setattr(chat_session, "stream", recording)
    return calls


def said(monkeypatch: pytest.MonkeyPatch, *pieces: str) -> None:
    """Make every model say these pieces, each a token of probability 0.9."""
    tokens = [StreamedToken(ord("x"), piece, 0.9) for piece in pieces]
    monkeypatch.setattr(chat_session, "stream", lambda *_: iter(tokens))


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def theirs(model: Path, ids: list[int], adapter: Path | None = None, seed: int = 0, **sampling: Any) -> str:
    """mlx-lm's own reply of 24 tokens, as a terminal may be given it."""
    loaded = mlx_lm_load(str(model), adapter_path=str(adapter) if adapter else None)
    mx.random.seed(seed)
    return plain_text(mlx_lm_generate(loaded[0], loaded[1], ids, max_tokens=24, sampler=make_sampler(**sampling))) + "\n"


def system_chatml_ids(system: str, user: str) -> list[int]:
    return [IM_START, *b"system\n", *system.encode(), IM_END, *b"\n", *chatml_ids(user)]


def refused(*arguments: object) -> str:
    with pytest.raises(UserError) as error:
        prompt([str(each) for each in arguments])
    return str(error.value)


def test_a_greedy_reply_is_mlx_lms_own_and_all_that_stands_on_standard_output(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prompt(["-p", "Why?", "--model-id", str(model), "-nt", "24"]) == 0
    written = capsys.readouterr()
    assert written.out == theirs(model, chatml_ids("Why?"))
    assert re.fullmatch(
        r"\(stopped at max_tokens\)\n\(24 tokens, [\d.]+ tokens/s; the prompt's 23 tokens took [\d.]+ s\)\n", written.err
    )


def test_a_drawn_reply_is_mlx_lms_for_the_same_seed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-p", "Why?", "--model", str(model), "--num-tokens=24", "-t", "0.8", "-tp", "0.95", "--top-k", "50"]
    replies = []
    for seed in ("5", "5", "6"):
        assert prompt([*words, "--seed", seed]) == 0
        replies.append(capsys.readouterr().out)
    assert replies[0] == theirs(model, chatml_ids("Why?"), seed=5, temp=0.8, top_p=0.95, top_k=50)
    assert replies[1] == replies[0] != replies[2]


def test_every_sampling_option_arrives(model: Path, recorded: Recorded) -> None:
    words = ["-nt", "3", "-t", "0.7", "-tp", "0.9", "--min-p", "0.02", "--min-p-tokens", "4", "--top-k", "7", "-rp", "1.3"]
    words += ["--repetition-context-size", "9", "--seed", "11"]
    prompt(["-p", "Hi", "--model-id", str(model), *words])
    assert recorded == [(chatml_ids("Hi"), SamplingSettings(3, 0.7, 0.9, 0.02, 4, 7, 1.3, 9, 11))]


def test_mlx_tuning_forks_words_for_not_given_are_understood(model: Path, recorded: Recorded) -> None:
    prompt(["-p", "Hi", "--model-id", str(model), *["--num-tokens", "-1", "--min-p", "-1", "-rp", "0"]])
    assert recorded[0][1] == SamplingSettings()


def test_a_comparison_is_both_replies_under_headings(model: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = run / "adapters"
    words = ["--compare", "-a", str(adapter), "-p", "Why?", "--system-prompt", "Be kind.", "-nt", "24"]
    assert prompt(words) == 0
    written = capsys.readouterr()
    ids = system_chatml_ids("Be kind.", "Why?")
    base, tuned = f"Base model ({model})", f"Tuned model ({adapter})"
    assert written.out == (
        f"{base}\n{'-' * len(base)}\n{theirs(model, ids)}\n{tuned}\n{'-' * len(tuned)}\n{theirs(model, ids, adapter)}"
    )
    assert theirs(model, ids) != theirs(model, ids, adapter)
    assert len(re.findall(r"\(\d+ tokens, [\d.]+ tokens/s; the prompt's 41 tokens took [\d.]+ s\)", written.err)) == 2


def test_a_run_brings_its_model_adapter_and_prompt(model: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prompt(["--run", str(run), "-p", "Why?", "-nt", "24"]) == 0
    assert capsys.readouterr().out == theirs(model, system_chatml_ids("Be kind.", "Why?"), run / "adapters")


def test_a_run_without_its_adapter_is_its_base_model(model: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prompt(["--run", str(run), "-a", "", "-p", "Why?", "-nt", "24"]) == 0
    assert capsys.readouterr().out == theirs(model, system_chatml_ids("Be kind.", "Why?"))


def test_a_training_file_of_mlx_lms_names_model_adapter_and_sampling(
    model: Path, run: Path, tmp_path: Path, recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    values = {
        "model": str(model), "adapter_path": str(run / "adapters"), "train": True, "seed": 3, "learning_rate": 1e-5,
        "lora_parameters": {"rank": 8, "scale": 20.0}, "temperature": 0.5, "top_p": 0.9, "num_tokens": 4, "prompt": "From a file",
        "wandb_project": "x", "system_prompt": "Be kind.",
    }  # fmt: skip
    path.write_text(yaml.safe_dump(values))
    prompt(["-c", str(path)])
    prompt(["-c", str(path), "-p", "Mine", "-t", "0"])
    sampled = SamplingSettings(max_tokens=4, temperature=0.5, top_p=0.9)
    assert recorded[0] == (system_chatml_ids("Be kind.", "From a file"), sampled)
    assert recorded[1] == (system_chatml_ids("Be kind.", "Mine"), SamplingSettings(max_tokens=4, top_p=0.9))
    prompt(["-a", str(run / "adapters"), "-p", "Mine", "-nt", "4", "--system-prompt", "Be kind."])
    replies = capsys.readouterr().out.split("\n")
    assert len(recorded) == 3 and replies[-2] == replies[-3]  # the adapter of the file and the one of -a are the same


def test_what_shapes_a_prompt_in_training_shapes_it_here(model: Path, tmp_path: Path, recorded: Recorded) -> None:
    examples = tmp_path / "examples.json"
    examples.write_text(json.dumps([{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]))
    words = ["--set", "input_template=<{input}>", "--cot-source", str(examples), "--model-id", str(model), "-nt", "1"]
    prompt(["-p", "Hi", *words])
    assert recorded[0][0] == [*chatml_ids("1"), *b"2", IM_END, *b"\n", *chatml_ids("<Hi>")]


def test_a_named_format_and_a_module_take_their_places(model: Path, tmp_path: Path, recorded: Recorded) -> None:
    module = tmp_path / "own.py"
    module.write_text("def chat_template() -> str:\n    return '{{ messages[0].content }}!<|im_end|>'\n")
    prompt(["-p", "Hi", "--module", str(module), "--model-id", str(model), "-nt", "1"])
    prompt(["-p", "Hi", "-f", "alpaca", "--model-id", str(model), "-nt", "1"])
    assert recorded[0][0] == [*b"Hi!", IM_END]
    assert recorded[1][0] == [*b"### Instruction:\nHi\n\n### Response:\n"]


def test_a_word_loom_makes_the_prompt(model: Path, loom: Path, recorded: Recorded) -> None:
    common = ["--model-id", str(model), "--loom-file", str(loom), "-nt", "1"]
    prompt([*common, "--loom-markers", "thing=[a word loom]"])
    prompt([*common, "--build-prompt", "ask", "-p", "something"])
    assert recorded[0][0] == system_chatml_ids("Be brief.", "What is a word loom?")
    assert recorded[1][0] == system_chatml_ids("Be brief.", "Tell me: something")


def test_markers_may_be_given_one_by_one_and_a_files_prompt_gives_way_to_the_loom(
    model: Path, loom: Path, tmp_path: Path, recorded: Recorded
) -> None:
    loom.write_text('[q]\n_ = "{a} and {b}"\n')
    config = tmp_path / "config.yaml"
    config.write_text("prompt: not this\n")
    markers = ["--loom-markers", "a=[1]", "--loom-markers", "b=[2]"]
    words = ["--loom-file", str(loom), "--build-prompt", "q", *markers, "-c", str(config)]
    prompt([*words, "--model-id", str(model), "-nt", "1"])
    assert recorded[0][0] == chatml_ids("1 and 2")


def test_the_prompt_is_read_from_standard_input_whole(model: Path, recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in ([], ["-p", "-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Two\nlines\n"))
        prompt([*words, "--model-id", str(model), "-nt", "1"])
    assert [ids for ids, _ in recorded] == [chatml_ids("Two\nlines")] * 2


@pytest.mark.parametrize("unset", ["not a terminal", "NO_COLOR", "--no-colorize"])
def test_colours_are_for_terminals_that_want_them(
    model: Path, unset: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said(monkeypatch, "Yes", ".")
    out, err = (io.StringIO() if unset == "not a terminal" else Terminal() for _ in range(2))
    monkeypatch.setenv("NO_COLOR", "1" if unset == "NO_COLOR" else "")
    monkeypatch.setenv("TERM", "xterm")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        prompt(["-p", "Hi", "--model-id", str(model), "--no-colorize" if unset.startswith("--") else "--colorize"])
    assert out.getvalue() == "Yes.\n" and "\x1b" not in err.getvalue()


def test_on_a_terminal_each_token_has_its_colour_and_the_legend_stands_on_standard_error(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said(monkeypatch, "Yes", ".")
    out, err = Terminal(), Terminal()
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setenv("TERM", "xterm")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        prompt(["-p", "Hi", "--model-id", str(model), "--colorize"])
    assert out.getvalue() == "\x1b[38;5;16;48;5;185mYes\x1b[0m\x1b[38;5;16;48;5;185m.\x1b[0m\n"
    assert err.getvalue().startswith(f"{legend()}\n(2 tokens")


@pytest.mark.parametrize("colorize", [False, True])
def test_a_models_escape_sequences_do_not_reach_the_terminal_in_whatever_pieces_they_come(
    model: Path, colorize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said(monkeypatch, "a\x1b", "[2", "J\r", "\x9b", "1A\u202e", "b\x07")
    out = Terminal()
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setenv("TERM", "xterm")
    with contextlib.redirect_stdout(out):
        prompt(["-p", "Hi", "--model-id", str(model), *(["--colorize"] if colorize else [])])
    shown = re.sub(r"\x1b\[(38;5;\d+;48;5;\d+|0)m", "", out.getvalue())
    assert shown == "a\\x1b[2J\\r\\x9b1A\\u202eb\\x07\n"
    assert ("\x1b" in out.getvalue()) == colorize


def test_an_output_without_a_character_gets_its_escape(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said(monkeypatch, "caf\xe9 \u2713")
    written = io.BytesIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(written, encoding="latin-1")):
        prompt(["-p", "Hi", "--model-id", str(model)])
        assert written.getvalue() == b"caf\xe9 \\u2713\n"


def test_a_reply_ends_where_the_models_context_does(model: Path, recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    assert prompt(["-p", "x" * 485, "--model-id", str(model), "-nt", "50"]) == 0
    assert "(stopped at the model's context of 512 tokens)\n(8 tokens" in capsys.readouterr().err
    assert len(recorded[0][0]) == 504


def session(model: Path, max_tokens: int = 12) -> chat_session.ChatSession:
    speaker = chat_session.Speaker(
        engine.models.load_model(model), load_encoder(model), SamplingSettings(max_tokens=max_tokens), 512
    )
    return chat_session.ChatSession(speaker, engine.settings.PromptSettings())


def conversation(given: chat_session.ChatSession, *lines: str) -> tuple[str, str]:
    """What stands on standard output and on standard error after these lines."""
    waiting = iter([*lines, ""])
    out, notices = io.StringIO(), io.StringIO()
    chat_session.converse(given, lambda: next(waiting), out, notices)
    return out.getvalue(), notices.getvalue()


@contextlib.contextmanager
def typed(monkeypatch: pytest.MonkeyPatch, keys: bytes) -> Iterator[Callable[[], str]]:
    """Standard streams on a pseudo-terminal where `keys` are typed; a function that gives what was shown."""
    ours, theirs = pty.openpty()
    settings = termios.tcgetattr(theirs)
    settings[3] &= ~termios.ECHO
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    os.write(ours, keys)
    shown: list[bytes] = []

    def drain() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while piece := os.read(ours, 4096):
                shown.append(piece)

    reader = threading.Thread(target=drain)
    reader.start()
    with open(os.dup(theirs)) as keyboard, open(theirs, "w") as screen, monkeypatch.context() as patched:
        for name, file in (("stdin", keyboard), ("stdout", screen), ("stderr", screen)):
            patched.setattr(sys, name, file)
        yield lambda: b"".join(shown).decode().replace("\r\n", "\n")
    reader.join()
    os.close(ours)


def test_a_conversation_on_a_terminal_goes_on_from_what_was_said(
    model: Path, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    with typed(monkeypatch, b"Hi\nAnd now?\n\x04") as shown:
        assert prompt(["--model-id", str(model), "-nt", "6"]) == 0
    ids, settings = recorded[0]
    encoder = load_encoder(model)
    first = [each.token_id for each in engine.streaming.stream(engine.models.load_model(model), encoder, ids, settings)]
    assert ids == chatml_ids("Hi") and len(recorded) == 2
    assert recorded[1][0] == [*ids, *encoder.plain_ids(encoder.reply_text(first)), IM_END, *b"\n", *chatml_ids("And now?")]
    assert shown().startswith("An empty line or Ctrl-D ends the conversation")
    assert shown().count("> ") == 3 and f"> {plain_text(encoder.decode(first))}\n(stopped at max_tokens)\n" in shown()


def test_commands_reset_the_conversation_and_set_the_system_prompt(model: Path, recorded: Recorded) -> None:
    _, notices = conversation(session(model), "One", "/reset", "/system Be kind.", "Two", "/system", "/help", "/rest", " /three")
    assert [ids for ids, _ in recorded][:2] == [chatml_ids("One"), system_chatml_ids("Be kind.", "Two")]
    assert recorded[2][0][:5] == [IM_START, *b"user"] and recorded[2][0][-len(chatml_ids("/three")) :] == chatml_ids("/three")
    assert "(the conversation begins anew)\n(the system prompt is set)\n" in notices
    assert "(no system prompt)\n  /help " in notices
    assert "Error: Unknown command '/rest'. Did you mean '/reset'? The commands are /help, /reset, /system;" in notices


def test_the_oldest_turns_are_left_out_when_the_context_is_full(model: Path, recorded: Recorded) -> None:
    given = session(model)
    _, notices = conversation(given, "a" * 200, "b" * 200, "c" * 200, "d" * 470)
    firsts = [bytes(each for each in ids if each < 256).decode(errors="replace")[5] for ids, _ in recorded]
    assert firsts == ["a", "a", "b", "d"]
    assert notices.count("(the oldest turn is left out: the model's context is 512 tokens)") == 1
    assert notices.count("(the oldest 2 turns are left out: the model's context is 512 tokens)") == 1
    assert all(len(ids) + settings.max_tokens <= 512 for ids, settings in recorded) and len(given.turns) == 1


def test_a_mistake_ends_a_turn_and_not_the_conversation(model: Path, recorded: Recorded) -> None:
    _, notices = conversation(session(model), "x" * 600, "Hi")
    assert notices.startswith(
        "Error: The prompt has 619 tokens, and the model's context of 512 has to hold the reply, too. Shorten the prompt.\n"
    )
    assert [ids for ids, _ in recorded] == [chatml_ids("Hi")]


def test_an_interrupted_reply_stays_in_the_conversation_as_far_as_it_came(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Iterator[StreamedToken]:
        yield StreamedToken(ord("Y"), "Y", 1.0)
        yield StreamedToken(ord("e"), "e", 1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_session, "stream", interrupted)
    given = session(model)
    out, notices = conversation(given, "Hi", "/help")
    assert out == "Ye\n" and notices.startswith("(stopped)\n  /help")
    assert given.turns == [({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ye"})]


def test_an_interruption_before_the_first_token_leaves_the_turn_out(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Iterator[StreamedToken]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(chat_session, "stream", interrupted)
    given = session(model)
    assert conversation(given, "Hi") == ("", "(stopped)\n") and given.turns == []


def test_ctrl_c_stops_a_reply_and_at_the_prompt_the_program(tmp_path: Path) -> None:
    endless = write_tiny_model(tmp_path / "endless")  # it says one thing over and over
    config = json.loads((endless / "config.json").read_text())
    (endless / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 10**6}))
    ours, theirs = pty.openpty()
    code = "import sys; from finetune_dataflow.cli.prompt import prompt; sys.exit(prompt(sys.argv[1:]))"
    child = subprocess.Popen(
        [sys.executable, "-c", code, "--model-id", str(endless), "-nt", "1000000"],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)

    def until(wanted: bytes) -> bytes:
        seen = b""
        while wanted not in seen:
            seen += os.read(ours, 1024)
        return seen

    try:
        until(b"> ")
        os.write(ours, b"Hi\n")
        until(b"Hi\r\n")
        os.read(ours, 1)  # of the reply
        os.write(ours, b"\x03")
        until(b"(stopped)\r\n> ")
        for _ in range(4):  # readline loses one that comes before it listens
            os.write(ours, b"\x03")
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=5)
                break
        assert child.returncode == 0
    finally:
        child.kill()
        child.wait()
        os.close(ours)


REFUSED = {
    "an unknown option": (["-p", "x", "--temprature", "1"], "Unknown option '--temprature'. Did you mean 'temperature'?"),
    "a short one": (["-q", "x"], "Unknown option '--q'."),
    "a stray word": (["Why?"], "'Why?' was not expected. The prompt is given with -p"),
    "no value": (["-p"], "-p needs a value."),
    "twice": (["-p", "x", "--prompt", "y"], "--prompt is given twice."),
    "no number": (["-p", "x", "-t", "warm"], "temperature='warm': expected a number."),
    "no whole number": (["-p", "x", "-nt", "2.5"], "max_tokens='2.5': expected a whole number."),
    "temperature": (["-p", "x", "-t", "-1"], "temperature=-1.0 is out of range. Expected 0"),
    "temperature nan": (["-p", "x", "-t", "nan"], "temperature=nan is out of range."),
    "tokens": (["-p", "x", "-nt", "0"], "max_tokens=0 is out of range. Expected a whole number, 1 or more."),
    "top_p": (["-p", "x", "-tp", "1.5"], "top_p=1.5 is out of range. Expected a share from 0 to 1."),
    "min_p": (["-p", "x", "--min-p", "-0.5"], "min_p=-0.5 is out of range."),
    "penalty": (["-p", "x", "-rp", "-2"], "repetition_penalty=-2.0 is out of range."),
    "seed": (["-p", "x", "--seed", "-1"], "random_state=-1 is out of range."),
    "training": (["-p", "x", "--learning-rate", "1"], "--learning-rate does not shape a prompt."),
    "code": (["-p", "x", "--trust-remote-code", "true"], "trust_remote_code=True is refused. Code from a model's"),
    "no adapter": (["-p", "x", "-a", "/no/where"], "adapter_path='/no/where': there is no such directory."),
    "no run": (["-p", "x", "--run", "/no/where"], "--run '/no/where': there is no such directory."),
    "run and file": (["--run", "a", "-c", "b"], "--run and --config both name a file of inputs. Give one."),
    "no file": (["-c", "/no/where.yaml"], "The configuration /no/where.yaml cannot be read: No such file or directory."),
    "nothing to compare": (["-p", "x", "--compare"], "--compare needs a tuned model. Name its adapter in --adapter-path"),
    "empty": (["-p", " "], "--prompt is empty."),
    "no UTF-8": (["-p", "\udcff"], "-p is not UTF-8, at character 0."),
    "tables without a loom": (["-p", "x", "--build-prompt", "q"], "build_prompt need"),
    "no format": (["-p", "x", "-f", "chatlm"], "Did you mean 'chatml'?"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_told_in_one_line(case: str) -> None:
    words, expected = REFUSED[case]
    message = refused(*words)
    assert expected in message and "\n" not in message


def test_all_bad_values_are_told_together() -> None:
    assert refused("-p", "x", "-t", "warm", "--top-k", "some", "--nonsense", "1").count("\n") == 2


def test_a_loom_without_the_default_question_asks_for_its_tables(loom: Path) -> None:
    loom.write_text('[first]\n_ = "Hi"\n[second]\n_ = "Ho"\n')
    assert refused("--loom-file", loom) == (
        f"loom_file {loom} has no table [question]. Name the tables that make the prompt in build_prompt. It has: first, second."
    )


def test_a_loom_that_is_a_whole_prompt_leaves_no_place_for_another(loom: Path) -> None:
    assert refused("--loom-file", loom, "-p", "x", "--loom-markers", "thing=[a loom]") == (
        f"Two prompts: --prompt, and the word loom {loom}, no text of which names {{input}}. Give one."
    )


def test_a_marker_without_a_value_is_named(loom: Path) -> None:
    assert "no value for {thing}" in refused("--loom-file", loom)


def test_an_adapter_of_another_model_is_refused_before_anything_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    larger = write_tiny_model(tmp_path / "larger", hidden_size=64)
    error = refused("--compare", "-p", "x", "-a", run / "adapters", "--model-id", larger)
    assert f"The adapter in {run / 'adapters'} does not fit the model in {larger}" in error
    assert capsys.readouterr().out == ""


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    assert refused("--run", tmp_path) == (
        f"--run '{tmp_path}': there is no finished run: config.yaml is missing. Expected the directory of a run."
    )


def test_an_unknown_key_in_a_file_is_named_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("temprature: 1\nrun: x\neos_token: x\nnum_tokens: many\n")
    lines = refused("-c", path, "-p", "x").split("\n")
    assert lines[0] == f"{path}: Unknown option 'temprature'. Did you mean 'temperature'?"
    assert lines[1].startswith(f"{path}: Unknown option 'run'.")
    assert lines[2].startswith(f"{path}: eos_token='x' is refused.")
    assert lines[3] == f"{path}: max_tokens='many': expected a whole number."


def test_a_conversation_is_not_compared(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert refused("--compare", "--run", run) == "--compare is for one prompt. Give it with --prompt, or on standard input."


@pytest.mark.parametrize("given", [b"", b" \n", b"\xff\xfe"])
def test_standard_input_without_a_text_is_refused(given: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
    expected = "Standard input is not UTF-8" if given == b"\xff\xfe" else "There is no prompt. Give it with --prompt"
    assert refused("--model-id", "x").startswith(expected)


def test_help_names_every_option_and_is_printed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert prompt(["--help"]) == prompt(["-p", "x", "-h"]) == 0
    assert capsys.readouterr().out == HELP * 2
    spelled = {"max_tokens": "num_tokens", "random_state": "seed"}
    for name in OWN:
        assert f"--{spelled.get(name, name).replace('_', '-')}" in HELP
    assert all(f"-{short}, --" in HELP for short in SHORT) and "--cot-source" in HELP and "cot_source" in OTHER_NAMES
