"""Word looms: prompts kept in a TOML file of named texts (OgbujiPT's convention), for training and generation alike.

`build_prompt` names tables as mlx-tuning-fork does: one name is the question; two are system prompt and question; three are
system prompt, context and question. What it does not name is `system_prompt`, `context`, `question`; the first two may then
be missing from the file. A context of the form `[notes.txt]` is the text of that file, taken as it is.

A text's markers `{name}` are filled from `loom_markers` (`name=[value]`), and what is not named there from the row's columns.
"""

from __future__ import annotations

import re
import tomllib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ogbujipt import word_loom

from finetune_dataflow.engine.markers import Template, parsed
from finetune_dataflow.errors import UserError, nearest

_LIBRARY_LANGUAGE = "en"  # what OgbujiPT takes a loom to be in that does not say
_TABLE_NAMES = re.compile(r"\[[^\]]*\]|\S+")
_NOTHING_ELSE = r"(?=\s+[^\s=\[\]]+=\[|\s*$)"  # another pair, or the end
_MARKER = re.compile(r"\s*(?P<name>[^\s=\[\]]+)=\[(?P<value>.*?)\]" + _NOTHING_ELSE, re.DOTALL)


@dataclass(frozen=True)
class LoomSettings:
    """Which texts of which loom make a prompt. `loom_markers` is one string of pairs, or several. Empty means not given."""

    loom_file: str
    build_prompt: str = ""
    loom_markers: str | tuple[str, ...] = ()
    loom_language: str = ""


@dataclass(frozen=True)
class Loom:
    """A word loom: for each table, its text in each language."""

    path: Path
    language: str
    tables: Mapping[str, Mapping[str, str]]
    declared_markers: Mapping[str, tuple[str, ...]]

    def template(self, table: str, language: str) -> Template:
        """The text of a table in a language. Raises UserError where there is none, or a declared marker is not in it."""
        if table not in self.tables:
            raise UserError(
                f"{self.path} has no table [{table}] with a text.{nearest(table, self.tables)} "
                f"It has: {', '.join(self.tables) or 'none'}."
            )
        texts = self.tables[table]
        if language not in texts:
            raise UserError(
                f"{self.path}: the table [{table}] has no text in {language!r}.{nearest(language, texts)} "
                f"It has: {', '.join(texts)}. Set loom_language."
            )
        template = parsed(texts[language], f"{self.path}, table [{table}]")
        for marker in self.declared_markers.get(table, ()):
            if marker not in template.markers:
                raise UserError(
                    f"{template.where}: _m declares the marker {marker!r}, which the text in {language!r} does not "
                    f"have.{nearest(marker, template.markers)}"
                )
        return template


@dataclass(frozen=True)
class LoomParts:
    """The texts of one prompt; None where the loom has no such part."""

    system: str | None
    context: str | None
    question: str


@dataclass(frozen=True)
class PreparedLoom:
    """A loom whose tables are found and whose markers are known, to be filled for each row."""

    system: Template | None
    context: Template | None
    question: Template
    values: Mapping[str, str]

    @property
    def row_markers(self) -> frozenset[str]:
        """The markers that `loom_markers` leaves to the columns of a row."""
        return frozenset().union(*(part.markers for part in self._templates())) - frozenset(self.values)

    def parts(self, columns: Mapping[str, object]) -> LoomParts:
        """The texts for a row with these columns. A value of `loom_markers` goes before a column of its name.

        Raises UserError for a marker that neither gives a value.
        """
        values = {**columns, **self.values}
        missing = sorted(self.row_markers - set(columns))
        if missing:
            named = ", ".join(f"{{{name}}}" for name in missing)
            where = next(part.where for part in self._templates() if missing[0] in part.markers)
            raise UserError(
                f"{where}: no value for {named}.{nearest(missing[0], columns)} Expected loom_markers "
                f"'{missing[0]}=[value]', or a column of that name. Columns: {', '.join(columns) or 'none'}."
            )
        return LoomParts(
            (self.system.fill(values) or None) if self.system else None,
            (self.context.fill(values) or None) if self.context else None,
            self.question.fill(values),
        )

    def _templates(self) -> list[Template]:
        return [part for part in (self.system, self.context, self.question) if part is not None]


def loom_parts(settings: LoomSettings, columns: Mapping[str, object]) -> LoomParts:
    """The texts of one prompt. For many rows, `prepared_loom` reads the file once."""
    return prepared_loom(settings).parts(columns)


def prepared_loom(settings: LoomSettings) -> PreparedLoom:
    """The loom's tables for these settings, read and checked.

    Raises UserError for a file that is no word loom, a table it does not have, and a value for a marker no text has.
    """
    loom = load_loom(settings.loom_file)
    language = settings.loom_language or loom.language
    names = _TABLE_NAMES.findall(settings.build_prompt)
    if len(names) > 3:
        raise UserError(
            f"build_prompt is {settings.build_prompt!r}: {len(names)} tables. Expected one (the question), two (system prompt, "
            "question) or three (system prompt, context, question)."
        )
    question = names.pop() if names else "question"
    system = _optional(loom, "system_prompt", language) if not names else _named(loom, names[0], language)
    if len(names) < 2:
        context = _optional(loom, "context", language)
    elif names[1].startswith("[") and names[1].endswith("]"):
        context = _file_text(names[1][1:-1])
    else:
        context = _named(loom, names[1], language)
    values = marker_values(settings.loom_markers)
    prepared = PreparedLoom(system, context, _named(loom, question, language), values)
    known = frozenset().union(*(part.markers for part in prepared._templates()))
    for name in values:
        if name not in known:
            raise UserError(
                f"loom_markers gives a value for {name!r}, a marker that no text of the prompt has.{nearest(name, known)} "
                f"Markers of {loom.path}: {', '.join(sorted(known)) or 'none'}."
            )
    return prepared


def load_loom(path: str | Path) -> Loom:
    """The word loom in a TOML file. Older looms, with `text` and `markers` for `_` and `_m`, are read alike.

    Raises UserError for a file that is missing, not UTF-8, not TOML, or whose tables hold something else than texts.
    """
    path = Path(path)
    text = _read(path, "loom_file")
    try:
        raw = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"loom_file: {path} is not valid TOML: {error}.") from error
    raw_tables = {name: table for name, table in raw.items() if isinstance(table, dict)}
    _check_types(path, raw, raw_tables)
    language = raw.get("lang", _LIBRARY_LANGUAGE)
    if "lang" not in raw:
        text = f"lang = {_LIBRARY_LANGUAGE!r}\n{text}"  # without it OgbujiPT leaves out every table that names no language
    tables: dict[str, dict[str, str]] = {}
    for each in dict.fromkeys([language, *(table["lang"] for table in raw_tables.values() if "lang" in table)]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of the older keys, which are meant to work
            items = word_loom.load(text, lang=each, preserve_key=True)
        for item in items.values():  # its keys are the tables' names and, once more, the literal texts
            tables[item.meta["_key"]] = {item.lang: str(item), **item.altlang}
    if not tables:
        raise UserError(f'loom_file: {path} has no table with a text. Expected [question] with _ = "…".')
    declared = {name: tuple(raw_tables[name].get("markers") or raw_tables[name].get("_m") or ()) for name in tables}
    ordered = {name: tables[name] for name in raw_tables if name in tables}
    return Loom(path, language, ordered, declared)


def marker_values(loom_markers: str | Iterable[str]) -> dict[str, str]:
    """The values in `name=[value] other=[value]`, given as one string or several. A value's brackets are not part of it."""
    values: dict[str, str] = {}
    for text in [loom_markers] if isinstance(loom_markers, str) else loom_markers:
        position = 0
        while text[position:].strip():
            match = _MARKER.match(text, position)
            if not match:
                raise UserError(f"loom_markers: {text[position:].strip()!r} is no marker value. Expected name=[value].")
            if match["name"] in values:
                raise UserError(f"loom_markers gives two values for {match['name']!r}. Expected one.")
            values[match["name"]] = match["value"]
            position = match.end()
    return values


def _named(loom: Loom, name: str, language: str) -> Template:
    if name.startswith("["):
        raise UserError(f"build_prompt: {name} is a file, which only the context can be: the second of three names.")
    return loom.template(name, language)


def _optional(loom: Loom, name: str, language: str) -> Template | None:
    return loom.template(name, language) if name in loom.tables else None


def _file_text(name: str) -> Template:
    """The context in a file, as it is: its braces are no markers."""
    text = _read(Path(name), "build_prompt")
    return parsed(text.replace("{", "{{").replace("}", "}}"), name)


def _read(path: Path, option: str) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{option}: {path} is not UTF-8, at byte {error.start}.") from error
    except (OSError, ValueError, RuntimeError) as error:  # a null character; a home directory that is not there
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{option}: {path} cannot be read: {reason}. Expected a text file.") from error


def _check_types(path: Path, raw: Mapping[str, object], tables: Mapping[str, Mapping[str, object]]) -> None:
    """Raise UserError, naming all of them, for languages and texts that are no texts and markers that are no list of names."""
    wrong = [] if isinstance(raw.get("lang", ""), str) else [f"lang is {raw['lang']!r}, expected a text"]
    for name, table in tables.items():
        for key, value in table.items():
            if key in ("_m", "markers"):
                if not (isinstance(value, list | dict) and all(isinstance(each, str) for each in value)):
                    wrong.append(f"[{name}] {key} is {value!r}, expected a list of names")
            elif (key in ("text", "lang") or key.startswith("_")) and not isinstance(value, str):
                wrong.append(f"[{name}] {key} is {value!r}, expected a text")
    if wrong:
        raise UserError(f"loom_file: {path}: {'; '.join(wrong)}.")
