"""The dataflow as one flat module: the nodes of the package in the order of execution, their engine from the installed wheel.

The text is cut from the modules that `finetune_dataflow.NODES` names, so docstrings and comments stay; what Python sees is
changed in four places. The tags that the package puts on stand as decorators. Public functions that are no nodes get an
underscore, because every public function of a module is a node to Hamilton. Of private names that two modules have, the later
ones are renamed. Where a module names the package, to draw its graph, the flat module names itself.
"""

from __future__ import annotations

import ast
import builtins
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import finetune_dataflow
from finetune_dataflow import ARTIFACTS, COSTLY, NODES
from finetune_dataflow.errors import UserError

PACKAGE = "finetune_dataflow"
WIDTH = 130
ITSELF = "sys.modules[__name__]"
_DIRECTORY = Path(finetune_dataflow.__file__).parent


@dataclass(frozen=True)
class Import:
    """One name that an import binds; `name` is empty where it is the module itself."""

    module: str
    name: str
    bound: str

    @property
    def line(self) -> str:
        """The import statement."""
        if not self.name:
            return f"import {self.module}" + ("" if self.module == self.bound else f" as {self.bound}")
        return f"from {self.module} import {self.name}" + ("" if self.name == self.bound else f" as {self.bound}")


@dataclass(frozen=True)
class Stage:
    """A module of nodes, taken apart: its imports, those for type checkers only, and what follows them."""

    name: str
    text: str
    story: str
    imports: tuple[Import, ...]
    type_imports: tuple[Import, ...]
    body: tuple[ast.stmt, ...]
    first_line: int

    @property
    def definitions(self) -> list[str]:
        """The names that the body binds."""
        return [name for statement in self.body for name in _bound(statement)]

    @property
    def helpers(self) -> list[str]:
        """The functions of the body that have a public name and are no nodes."""
        functions = [each.name for each in self.body if isinstance(each, ast.FunctionDef)]
        return [name for name in functions if not name.startswith("_") and name not in NODES[self.name]]


@dataclass(frozen=True)
class Edit:
    """What stands in a line between two columns (in bytes) becomes another text."""

    line: int
    start: int
    end: int
    text: str


def flat_module(name: str) -> str:
    """The source of the flat module, formatted; `name` is what its docstring calls it.

    Raises UserError where the modules cannot be put together, or the result does not pass the linter.
    """
    stages = [_stage(each) for each in NODES]
    names = _new_names(stages)
    imports, type_imports = _imports(stages)
    _check_names(stages, names, [*imports, *type_imports])
    parts = [_head(name, imports, type_imports)]
    for stage in stages:
        story = textwrap.fill(" ".join(stage.story.split()), WIDTH, initial_indent="# ", subsequent_indent="# ")
        parts += [story, _body(stage, names)]
    return formatted("\n\n\n".join(parts) + "\n")


def formatted(source: str) -> str:
    """A module's source with its imports sorted, in this project's layout. Raises UserError where the linter has a complaint."""
    source = _ruff(["check", "--select", "I", "--fix"], source)
    source = _ruff(["format"], source)
    _ruff(["check"], source)
    return source


def _ruff(words: Sequence[str], source: str) -> str:
    command = [sys.executable, "-m", "ruff", *words, "--quiet", "--stdin-filename", f"{PACKAGE}.py", "-"]
    done = subprocess.run(command, cwd=_DIRECTORY.parent, input=source, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"The flat module does not pass `ruff {words[0]}`:\n{done.stdout or done.stderr}")
    return done.stdout


def _stage(name: str) -> Stage:
    text = (_DIRECTORY / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    head = [each for each in tree.body if _is_head(each)]
    body = [each for each in tree.body if not _is_head(each)]
    if head[-1].lineno > body[0].lineno:
        raise UserError(f"{PACKAGE}/{name}.py imports in line {head[-1].lineno}, below its first definition. Move it up.")
    types = [each for each in head if isinstance(each, ast.If)]
    imports = [each for each in head if each not in types]
    return Stage(
        name=name,
        text=text,
        story=ast.get_docstring(tree) or "",
        imports=tuple(_bindings(imports)),
        type_imports=tuple(_bindings([inner for each in types for inner in each.body])),
        body=tuple(body),
        first_line=(head[-1].end_lineno or 0) + 1,
    )


def _is_head(statement: ast.stmt) -> bool:
    """Whether it belongs above the definitions: a docstring, an import, imports for type checkers."""
    if isinstance(statement, ast.If):
        return "TYPE_CHECKING" in ast.unparse(statement.test)
    return isinstance(statement, ast.Import | ast.ImportFrom | ast.Expr)


def _bindings(statements: Sequence[ast.stmt]) -> Iterator[Import]:
    for statement in statements:
        if isinstance(statement, ast.Import):
            yield from (Import(each.name, "", each.asname or each.name) for each in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.module and statement.module != "__future__":
            yield from (Import(statement.module, each.name, each.asname or each.name) for each in statement.names)


def _bound(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    targets = [*getattr(statement, "targets", ()), *([statement.target] if isinstance(statement, ast.AnnAssign) else ())]
    return [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]


def _new_names(stages: Sequence[Stage]) -> dict[str, dict[str, str]]:
    """By stage: the names that are called otherwise in the flat module, with what stands there instead."""
    taken: set[str] = set()
    names: dict[str, dict[str, str]] = {}
    for stage in stages:
        own = {helper: f"_{helper}" for helper in stage.helpers}
        for name in stage.definitions:
            if own.get(name, name) in taken:
                own[name] = f"_{stage.name}_{name.lstrip('_')}"
            taken.add(own.get(name, name))
        names[stage.name] = own
    for stage in stages:
        for each in stage.imports:
            if each == Import(PACKAGE, "", PACKAGE):
                names[stage.name][PACKAGE] = ITSELF
            elif (origin := _stage_of(each)) is not None:
                names[stage.name][each.bound] = names[origin].get(each.name, each.name)
    return names


def _stage_of(each: Import) -> str | None:
    """The stage that an import takes a name from, if any."""
    package, _, module = each.module.rpartition(".")
    return module if package == PACKAGE and module in NODES and each.name else None


def _imports(stages: Sequence[Stage]) -> tuple[list[Import], list[Import]]:
    """What the flat module imports, and what it imports for type checkers only; each once."""
    used = [each for stage in stages for each in stage.imports if each.module != PACKAGE or each.name]
    own = [Import("logging", "", "logging"), Import("hamilton", "contrib", "contrib")]
    own += [Import("hamilton.function_modifiers", "tag", "tag")]
    if any(each.module == PACKAGE and not each.name for stage in stages for each in stage.imports):
        own.append(Import("sys", "", "sys"))
    found = [each for each in [*own, *used] if _stage_of(each) is None]
    types = [each for stage in stages for each in stage.type_imports if _stage_of(each) is None]
    return list(dict.fromkeys(found)), [each for each in dict.fromkeys(types) if each not in found]


def _check_names(stages: Sequence[Stage], names: Mapping[str, Mapping[str, str]], imports: Sequence[Import]) -> None:
    """Raise UserError where a name of the flat module would mean two things."""
    bound = [each.bound.partition(".")[0] if not each.name else each.bound for each in imports]
    defined = [names[stage.name].get(each, each) for stage in stages for each in stage.definitions]
    every = [*bound, *defined, "logger"]
    twice = sorted({each for each in every if every.count(each) > 1})
    hidden = sorted({*every} & {*dir(builtins)})
    if twice or hidden:
        raise UserError(f"In one module these names would mean two things: {', '.join([*twice, *hidden])}. Rename them.")


def _head(name: str, imports: Sequence[Import], type_imports: Sequence[Import]) -> str:
    story = (finetune_dataflow.__doc__ or "").strip().replace(f"with_modules({PACKAGE})", f"with_modules({name})")
    of_python = [each for each in imports if each.module.partition(".")[0] in sys.stdlib_module_names]
    of_hamilton = [each for each in imports if each.module.partition(".")[0] == "hamilton"]
    others = [each for each in imports if each not in of_python and each not in of_hamilton]
    lines = [
        "# SPDX-License-Identifier: Apache-2.0",
        f"# Made from {PACKAGE} {finetune_dataflow.__version__} by its publish/contrib.py. Change the package, not this file.",
        f'"""{story}',
        "",
        f"The engine, plain MLX code without nodes, is imported from the package {PACKAGE.replace('_', '-')} (requirements.txt).",
        '"""',
        "",
        "from __future__ import annotations",
        "",
        *(each.line for each in of_python),
        "",
        *(each.line for each in of_hamilton),
        "",
        "logger = logging.getLogger(__name__)",
        "",
        "with contrib.catch_import_errors(__name__, __file__, logger):",
        *(f"    {each.line}" for each in others),
    ]
    if type_imports:
        lines += ["", "if TYPE_CHECKING:", *(f"    {each.line}" for each in type_imports)]
    return "\n".join(lines)


def _body(stage: Stage, names: Mapping[str, Mapping[str, str]]) -> str:
    """What follows the imports, with tags and new names."""
    lines = [each.encode() for each in stage.text.split("\n")]
    for edit in sorted(_edits(stage, names[stage.name]), key=lambda each: (each.line, each.start), reverse=True):
        line = lines[edit.line - 1]
        lines[edit.line - 1] = line[: edit.start] + edit.text.encode() + line[edit.end :]
    return b"\n".join(lines[stage.first_line - 1 :]).decode().strip("\n")


def _edits(stage: Stage, names: Mapping[str, str]) -> Iterator[Edit]:
    lines = stage.text.split("\n")
    for statement in stage.body:
        if isinstance(statement, ast.FunctionDef) and statement.name in NODES[stage.name]:
            first = min([statement.lineno, *(each.lineno for each in statement.decorator_list)])
            yield Edit(first, 0, 0, _tag(stage, statement.name))
        for node in ast.walk(statement):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names:
                start = node.col_offset + len("def " if isinstance(node, ast.FunctionDef) else "class ")
                yield _renamed(stage, lines, node.lineno, start, node.name, names)
            elif isinstance(node, ast.Name) and node.id in names:
                yield _renamed(stage, lines, node.lineno, node.col_offset, node.id, names)


def _renamed(stage: Stage, lines: Sequence[str], line: int, start: int, name: str, names: Mapping[str, str]) -> Edit:
    end = start + len(name.encode())
    if lines[line - 1].encode()[start:end] != name.encode():  # before Python 3.12 a place within an f-string is not exact
        raise UserError(f"{PACKAGE}/{stage.name}.py, line {line}: {name} cannot be renamed there. Write that line otherwise.")
    return Edit(line, start, end, names[name])


def _tag(stage: Stage, node: str) -> str:
    tags = {"stage": stage.name, "cost": "model" if node in COSTLY else "light"}
    if node in ARTIFACTS:
        tags["artifact"] = ARTIFACTS[node]
    return f"@tag({', '.join(f'{name}={value!r}' for name, value in tags.items())})\n"
