"""A directory that Ollama makes a model of: the Modelfile, the GGUF files that it names, and a README with the two commands.

A Modelfile has no escapes, and its reader drops what is not printable. So each text is written in the form that reads back
as itself, and a text that has no such form is refused: it could end early, and its rest be read as instructions.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from finetune_dataflow.engine.files import flush_tree, writing
from finetune_dataflow.engine.go_template import GoTemplate
from finetune_dataflow.engine.quality import shown
from finetune_dataflow.errors import UserError, nearest

MODELFILE, README, MODEL, ADAPTER = "Modelfile", "README.md", "model.gguf", "adapter.gguf"
FIRST_LINE = "# Written by finetune-dataflow: README.md says how to use it."

# Of Ollama's options, those that concern the model and not the machine.
PARAMETERS: Mapping[str, type] = {
    "num_ctx": int, "num_predict": int, "num_keep": int, "seed": int, "temperature": float, "top_k": int, "top_p": float,
    "min_p": float, "typical_p": float, "repeat_last_n": int, "repeat_penalty": float, "presence_penalty": float,
    "frequency_penalty": float,
}  # fmt: skip

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_NAME = re.compile(rf"(?:{_PART}(?::[0-9]{{1,5}})?/)?(?:{_PART}/)?{_PART}(?::{_PART})?")  # [host/][namespace/]model[:tag]
_MAGIC = b"GGUF"
_SHOWN = 80


def write_ollama(
    out: Path,
    *,
    gguf: Path | None,
    base_name: str | None,
    adapter_gguf: Path | None,
    template: GoTemplate,
    system: str,
    parameters: Mapping[str, object],
    name: str,
    license_text: str = "",
    notes: Sequence[str] = (),
) -> Path:
    """The directory `out`, whole or not there at all; an earlier one of ours is replaced.

    The model is `gguf` (the fused model, or the base that `adapter_gguf` belongs to) or, with an adapter, a model that Ollama
    knows as `base_name`. GGUF files are linked into the directory where that is possible, else copied. `parameters` are
    Ollama's, such as temperature and num_ctx; `stop` adds to the template's. `notes` are put into the README, a line each.

    Raises UserError, before anything is written, for files that are not there or no GGUF, a name that Ollama would refuse, an
    unknown parameter, a text that a Modelfile cannot hold, and a directory that holds other things.
    """
    target = Path(os.path.abspath(out))
    sources = _sources(gguf, base_name, adapter_gguf)
    check_name(name, "name")
    text = _modelfile(sources, base_name, template, system, parameters, license_text)
    _check_target(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with writing(target):
            temporary.mkdir(parents=True)
            for file, source in sources.items():
                _place(source, temporary / file)
            (temporary / MODELFILE).write_text(text, encoding="utf-8", newline="")
            readme = _readme(name, sources, base_name, [*notes, *template.notes])
            (temporary / README).write_text(readme, encoding="utf-8", newline="")
            flush_tree(temporary)
            _put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def fits_modelfile(text: str) -> bool:
    """Whether a Modelfile can hold `text`. One that it cannot hold, as a system text, fits into the template.

    (`go_template.translate` takes it as `default_system`.)
    """
    return _quoted(text) is not None


def check_name(name: str, option: str) -> None:
    """Raise UserError for a name that is not of Ollama's form, so that it can stand in a command."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{option}={shown(repr(name), _SHOWN)} is no name of a model in Ollama. Expected letters, digits, '-', '_' and '.', "
            "as in my-model, my-model:7b or someone/my-model."
        )


def _sources(gguf: Path | None, base_name: str | None, adapter_gguf: Path | None) -> dict[str, Path]:
    """The GGUF files by their names in the directory. Raises UserError where they make no model."""
    if (gguf is None) == (base_name is None):
        raise UserError("A Modelfile has one FROM: give either a GGUF file of the model, or the base model's name in Ollama.")
    if base_name is not None:
        check_name(base_name, "base_name")
        if base_name.lower().endswith(".gguf"):
            raise UserError(
                f"base_name={shown(repr(base_name), _SHOWN)} looks like a file. Give it as the GGUF file of the model."
            )
        if adapter_gguf is None:
            raise UserError(f"With base_name={base_name!r} an adapter is needed: without one, nothing of the training is in it.")
    sources = {file: path for file, path in ((MODEL, gguf), (ADAPTER, adapter_gguf)) if path is not None}
    for path in sources.values():
        if not path.is_file():
            raise UserError(f"There is no GGUF file {path}.")
        with writing(path), path.open("rb") as handle:
            if handle.read(len(_MAGIC)) != _MAGIC:
                raise UserError(f"{path} is no GGUF file: it does not begin with {_MAGIC.decode()!r}.")
    return sources


def _modelfile(
    sources: Mapping[str, Path],
    base_name: str | None,
    template: GoTemplate,
    system: str,
    parameters: Mapping[str, object],
    license_text: str,
) -> str:
    if system and not template.takes_system:
        raise UserError(
            "The chat template has no place for a system text, so the model was trained without one. Leave it out here."
        )
    lines = [FIRST_LINE, f"FROM {base_name or f'./{MODEL}'}"]
    lines += [f"ADAPTER ./{ADAPTER}"] if ADAPTER in sources else []
    lines.append(f"TEMPLATE {_written(template.text, 'The template')}")
    lines += [f"SYSTEM {_written(system, 'The system text')}"] if system else []
    lines += [f"PARAMETER {key} {value}" for key, value in _parameters(template, parameters)]
    lines += [f"LICENSE {_written(license_text, 'The licence')}"] if license_text else []
    return "\n".join(lines) + "\n"


def _parameters(template: GoTemplate, parameters: Mapping[str, object]) -> Iterable[tuple[str, str]]:
    """The parameters as they are written. Raises UserError for one that Ollama does not know, or a value of another kind."""
    own = parameters.get("stop", [])
    stops = [own] if isinstance(own, str) else own
    if not isinstance(stops, list | tuple) or not all(isinstance(each, str) and each for each in stops):
        raise UserError(
            f"Parameter stop={shown(repr(own), _SHOWN)}: expected a string, or a list of strings, none of them empty."
        )
    for each in dict.fromkeys([*template.stops, *stops]):
        yield "stop", _written(each, f"The stop string {shown(repr(each), _SHOWN)}", quotes=True)
    for key, value in parameters.items():
        if key == "stop":
            continue
        if key not in PARAMETERS:
            raise UserError(
                f"Parameter {shown(repr(key), _SHOWN)} is not known.{nearest(key, [*PARAMETERS, 'stop'])} "
                f"Expected some of stop, {', '.join(PARAMETERS)}."
            )
        whole = PARAMETERS[key] is int
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not math.isfinite(value):
            raise UserError(
                f"Parameter {key}={shown(repr(value), _SHOWN)}: expected {'a whole' if whole else 'a finite'} number."
            )
        yield key, str(value) if whole else f"{float(value):.10g}"


def _written(text: str, what: str, quotes: bool = False) -> str:
    """`text` as a value of a Modelfile. Raises UserError where there is no way to write it."""
    form = _quoted(text, quotes)
    if form is None:
        odd = next((each for each in text if not each.isprintable() and each not in "\n\r\t"), "")
        why = (
            f"it has the character {odd!a}, which Ollama drops when it reads the file"
            if odd
            else 'it has quotes at the end of a line, such as """, which would end it there'
        )
        raise UserError(f"{what} cannot be written into a Modelfile: {why}.")
    return form


def _quoted(text: str, quotes: bool = True) -> str | None:
    """The form of `text` that a Modelfile's reader takes back to it; None where none does. Without quotes only if need be."""
    forms = [f'"""{text}"""', f'"{text}"', text]
    if quotes and '"' not in text and "\n" not in text:
        forms = [forms[1], forms[0], text]
    return next((each for each in forms if each and _read(each) == text), None)


def _read(written: str) -> str | None:
    """What Ollama's reader makes of a value that a newline follows; None where it would end it earlier or later.

    A value ends at the first newline, white space before it left out, where its quotes are closed. Characters that are not
    printable are dropped.
    """
    taken = ""
    for place, each in enumerate(f"{written}\n"):
        if each in "\r\n":
            value = _unquoted(taken.strip(" \t\r\n"))
            if value is not None:
                return value if place == len(written) else None
            taken += each
        elif each == "\t" or each.isprintable():
            taken += each
    return None


def _unquoted(value: str) -> str | None:
    if value.startswith('"""'):
        return value[3:-3] if len(value) >= 6 and value.endswith('"""') else None
    if value.startswith('"'):
        return value[1:-1] if len(value) >= 2 and value.endswith('"') else None
    return value


def _readme(name: str, sources: Mapping[str, Path], base_name: str | None, notes: Sequence[str]) -> str:
    files = {
        MODELFILE: "what Ollama makes the model of: template, stop strings, parameters",
        MODEL: "the base model" if ADAPTER in sources else "the tuned model",
        ADAPTER: f"the adapter, for {base_name or MODEL}",
    }
    listed = "".join(f"* `{file}`: {what}\n" for file, what in files.items() if file in {MODELFILE, *sources})
    noted = "".join(f"* {' '.join(each.split())}\n" for each in notes)
    return (
        f"# {name}, for Ollama\n\nIn this directory (Ollama 0.3 or newer):\n\n```\n"
        f"ollama create {name} -f {MODELFILE}\nollama run {name}\n```\n\n{listed}\n"
        "The template writes a conversation as the training did. Ollama 0.30 and newer may prefer the chat template inside a\n"
        "GGUF file where that knows more, such as tools: `OLLAMA_GO_TEMPLATE=1` in the server's environment keeps to this one.\n"
        + (f"\n{noted}" if noted else "")
    )


def _place(source: Path, target: Path) -> None:
    """The file under another name: linked, because models are large, or copied where that is not possible."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _check_target(target: Path) -> None:
    """Raise UserError where `target` is a file, or a directory that holds what we did not write."""
    if not target.name:
        raise UserError(f"{target} cannot be written to. Name a directory of its own.")
    if not os.path.lexists(target):
        return
    if not target.is_dir() or target.is_symlink():
        raise UserError(f"{target} is there and no directory. Name another.")
    found = sorted(each.name for each in target.iterdir())
    others = [each for each in found if each not in (MODELFILE, README, MODEL, ADAPTER)]
    if not others and found:
        modelfile = target / MODELFILE
        begins = modelfile.read_bytes()[: len(FIRST_LINE)] if modelfile.is_file() else b""
        others = [] if begins == FIRST_LINE.encode() else found
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UserError(
            f"The directory {target} holds other things: {', '.join(shown(each, _SHOWN) for each in others[:3])}{more}. "
            "Name one that is empty or not there yet."
        )


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename a finished directory to its name; the one that has it goes only then."""
    old = temporary.with_name(f"{temporary.name}.old")
    if target.exists():
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        with suppress(OSError):
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
