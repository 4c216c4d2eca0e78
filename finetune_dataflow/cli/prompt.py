"""`run.py prompt`: one prompt to a base or tuned model, a comparison of both, or a conversation."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from finetune_dataflow import engine
from finetune_dataflow.errors import UserError

if TYPE_CHECKING:
    from finetune_dataflow.cli.prompt_options import Asked
    from finetune_dataflow.engine.chat_session import Answer, Speaker
    from finetune_dataflow.engine.control_strings import Message
    from finetune_dataflow.engine.settings import PromptSettings

HELP = """\
Give one prompt to a model, as it is or tuned, or talk to it.

usage: run.py prompt [options]

Without a prompt: a conversation where standard input is a terminal, else the prompt is read from standard input.
Only the reply goes to standard output.

what is asked, and whom:
  -p, --prompt TEXT                the prompt; - for standard input
  -a, --adapter-path DIR           an adapter in mlx-lm's layout, with the base model that it names; '' for none
  --run DIR                        a finished run: its adapter, its base model, its way to write a prompt
  --model-id MODEL                 the base model (default: the adapter's, else smollm2-135m-instruct)
  -c, --config FILE                a YAML file of a run, mlx-lm's and mlx-tuning-fork's keys included; options beside it win.
                                   Its adapter_path is the adapter; its seed and what only concerns training are not used
  --compare                        the base model's reply, then the tuned one's

how the prompt is written, as in training (docs/prompts.md):
  -f, --prompt-format FORMAT       a named format or a Jinja file (default: the tokenizer's chat template)
  --system-prompt TEXT             the system message
  --loom-file FILE                 a word loom (TOML) that holds the prompt's texts; {input} in them is --prompt
  --build-prompt NAMES             its tables: question; system and question; or system, context and question
                                   (default: system_prompt, context and question, as far as they are there)
  --loom-markers NAME=[VALUE]      what a marker in them stands for; may be given several times
  --few-shot-file FILE             examples put before the prompt as earlier turns (--cot-source is the same)
  --NAME VALUE, --set NAME=VALUE   any other input that shapes a prompt, as `run.py inputs` lists them
  --module FILE, --allow-code      nodes of your own, as in train

how the reply is chosen:
  -nt, --num-tokens NUMBER         the most tokens (--max-tokens is the same; default: 100)
  -t, --temperature NUMBER         0 for the most probable token every time (default), higher for more variety
  -tp, --top-p SHARE               keep the most probable tokens that make up this share (default: 1, all)
  --min-p SHARE                    keep what has this share of the highest probability (default: 0, all)
  --min-tokens-to-keep NUMBER      tokens that stay in any case (--min-p-tokens is the same; default: 1)
  --top-k NUMBER                   keep the most probable tokens (default: 0, all)
  -rp, --repetition-penalty NUMBER divide the logits of recent tokens by this (default: none)
  --repetition-context-size NUMBER how many tokens are recent (default: 20)
  --seed NUMBER                    the same seed, the same reply (default: 0)

  --colorize, --no-colorize        each token in the colour of its probability, on a terminal
  -h, --help                       this text
"""


def prompt(arguments: Sequence[str]) -> int:
    """Answer one prompt, or one after another. Returns 0; raises UserError for every mistake of the user's."""
    if {"-h", "--help"} & {*arguments}:
        print(HELP, end="")
        return 0
    # Imported here, so that --help answers without loading the dataflow.
    from finetune_dataflow.cli.prompt_options import FIRST_NODES, asked_for, read
    from finetune_dataflow.engine.chat_session import messages_of

    line = read(arguments)
    asked = asked_for(line)
    made = asked.made(*FIRST_NODES)
    text = _text(asked, "prompt" in line.given, made["prompt_settings"])
    if text is None and asked.own.get("compare"):
        raise UserError("--compare is for one prompt. Give it with --prompt, or on standard input.")
    messages = messages_of("?" if text is None else text, made["prompt_settings"])  # before a model is loaded for nothing
    made |= asked.made("base_model_path", *(["evaluated_adapter"] if "adapter_path" in asked.inputs else []))
    if text is None:
        _converse(asked, made)
    elif asked.own.get("compare"):
        _compare(asked, made, messages)
    else:
        _write(_speaker(asked, made).answer(messages), asked)
    return 0


def _converse(asked: Asked, made: Mapping[str, Any]) -> None:
    from finetune_dataflow.engine.chat_session import ChatSession, converse

    session = ChatSession(_speaker(asked, made), made["prompt_settings"])
    print("An empty line or Ctrl-D ends the conversation, Ctrl-C stops a reply; /help lists the commands.", file=sys.stderr)
    with suppress(ImportError):
        import readline  # noqa: F401 -- from here on a line can be edited, and those before it are remembered
    _explain_colors(asked)
    converse(session, _next_line, sys.stdout, sys.stderr, _in_color(asked))


def _next_line() -> str:
    """What the user types next; empty at the end."""
    mark = "> "
    if not sys.stdout.isatty():  # input() would write the mark into what is piped
        print(mark, end="", file=sys.stderr, flush=True)
        mark = ""
    try:
        return input(mark)
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr, flush=True)
        return ""


def _compare(asked: Asked, made: Mapping[str, Any], messages: Sequence[Message]) -> None:
    """The base model's reply, then the tuned one's, each under a heading."""
    from finetune_dataflow.embedded_model import EMBEDDED_MODEL_ID

    # An adapter that does not fit is told before the first reply; of this copy no weight is read.
    engine.models.load_model(made["base_model_path"], made["evaluated_adapter"], lazy=True)
    base = {name: value for name, value in made.items() if name != "evaluated_adapter"}
    headings = (
        f"Base model ({asked.inputs.get('model_id', EMBEDDED_MODEL_ID)})",
        f"Tuned model ({asked.inputs['adapter_path']})",
    )
    for number, (heading, nodes) in enumerate(zip(headings, (base, made), strict=True)):
        shown = engine.colors.plain_text(heading)
        print(f"{chr(10) * number}{shown}\n{'-' * len(shown)}", flush=True)
        _write(_speaker(asked, nodes).answer(messages), asked)


def _speaker(asked: Asked, made: Mapping[str, Any]) -> Speaker:
    """The model, tuned where an adapter was made out, ready to answer."""
    import mlx.core as mx

    from finetune_dataflow.engine.chat_session import Speaker, context_length

    directory = made["base_model_path"]
    encoder = engine.chat.load_encoder(directory, made["chat_template"])
    model = engine.models.load_model(directory, made.get("evaluated_adapter"))
    mx.eval(model.parameters())  # now, or reading the weights would count as reading the prompt
    return Speaker(model, encoder, asked.sampling, context_length(directory))


def _write(answer: Answer, asked: Asked) -> None:
    """The reply on standard output; what is said of it on standard error."""
    from finetune_dataflow.engine.chat_session import write_answer

    write_answer(answer, sys.stdout, _in_color(asked))
    _explain_colors(asked)
    if answer.cut:
        print(answer.cut, file=sys.stderr)
    print(f"({answer.figures})", file=sys.stderr, flush=True)


def _in_color(asked: Asked) -> bool:
    return bool(asked.own.get("colorize")) and engine.colors.wants_color(sys.stdout)


def _explain_colors(asked: Asked) -> None:
    if _in_color(asked) and engine.colors.wants_color(sys.stderr):
        print(engine.colors.legend(), file=sys.stderr, flush=True)


def _text(asked: Asked, on_line: bool, settings: PromptSettings) -> str | None:
    """The prompt's text: empty where the word loom makes all of it, None where a conversation is meant.

    on_line: whether --prompt is given; the `prompt` of a file gives way to a word loom.
    """
    from finetune_dataflow.engine.chat_session import is_prompt_itself

    text = asked.own.get("prompt", "")
    if is_prompt_itself(settings):
        if on_line:
            raise UserError(
                f"Two prompts: --prompt, and the word loom {settings.loom_file}, no text of which names {{input}}. Give one."
            )
        return ""
    if on_line and not text.strip():
        raise UserError("--prompt is empty. Expected a text, or - for standard input.")
    if text and not (on_line and text == "-"):
        return str(text)
    return None if not text and sys.stdin is not None and sys.stdin.isatty() else _standard_input()


def _standard_input() -> str:
    """All of standard input, without line ends at its end."""
    try:
        text = "" if sys.stdin is None else sys.stdin.read().rstrip("\r\n")
        text.encode("utf-8")
    except UnicodeError as error:
        raise UserError(f"Standard input is not UTF-8: {error}. Expected the prompt.") from error
    if not text.strip():
        raise UserError("There is no prompt. Give it with --prompt, or on standard input.")
    return text
