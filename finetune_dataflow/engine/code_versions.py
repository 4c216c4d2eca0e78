"""The version of a function's code: its helpers, the modules they import, and the libraries that compute."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKAGE = "finetune_dataflow"
# Their results are ours: another version of one may compute something else.
LIBRARIES = ("mlx", "mlx-lm", "transformers", "tokenizers", "numpy", "pandas", "rouge-score", "rensa", "pyarrow", "jinja2")


def code_version(function: Callable[..., Any]) -> str:
    """SHA-256 (hex) over the code that a function of this package may run, and the versions of the libraries below it.

    In its own module that is what it names, and what these name in turn; of other modules the whole, with all that they
    import from this package. Comments, docstrings and layout do not count.
    """
    digest = hashlib.sha256(_library_versions().encode())
    own, modules = code_of(function)
    for name, source in sorted({**own, **{module: _module(module).digest for module in modules}}.items()):
        digest.update(f"{name}\0{source}\0".encode())
    return digest.hexdigest()


def covers(function: Callable[..., Any]) -> bool:
    """Whether `code_version` knows a function: it is this package's, or of a module that imports from this package."""
    name = inspect.unwrap(function).__module__
    if name.startswith(PACKAGE):
        return True
    path = _find(name)
    return path is not None and path.suffix == ".py" and bool(_module(name).imports)


def code_of(function: Callable[..., Any]) -> tuple[dict[str, str], set[str]]:
    """The definitions of its own module that a function depends on (name: code), and the other modules of the package."""
    function = inspect.unwrap(function)
    module = _module(function.__module__)
    own: dict[str, str] = {}
    modules: set[str] = set()
    waiting = [function.__code__.co_name]  # as it is written: Hamilton takes suffixes like __base off the name
    while waiting:
        name = waiting.pop()
        key = f"{function.__module__}:{name}"
        if key in own or name not in module.definitions:
            continue
        definition = module.definitions[name]
        own[key] = ast.unparse(definition)
        used = _used(definition)
        waiting += used
        bound = [(each, module.imports[each]) for each in used & module.imports.keys()]
        for target in _modules_of([*bound, *_imports(definition)], definition):
            modules |= _closure(target)
    return own, modules - {function.__module__}


def package_version() -> str:
    """SHA-256 (hex) over the code of the whole package; comments, docstrings and layout do not count."""
    names = [f"{PACKAGE}.{each.stem}" for each in _path(PACKAGE).parent.glob("*.py") if each.stem != "__init__"]
    engines = [f"{PACKAGE}.engine.{each.stem}" for each in (_path(PACKAGE).parent / "engine").glob("*.py")]
    modules = [each for each in (*names, *engines) if _exists(each)]
    return hashlib.sha256("".join(f"{each}\0{_module(each).digest}\0" for each in sorted(modules)).encode()).hexdigest()


class _Module:
    """A module of the package, parsed: its definitions by name, what its imports bind, the modules that it may run."""

    def __init__(self, name: str) -> None:
        self.tree = _without_docstrings(ast.parse(_path(name).read_text(encoding="utf-8")))
        self.definitions: dict[str, ast.stmt] = {}
        self.imports: dict[str, str] = {}
        for statement in _executed(self.tree.body):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                self.imports |= {bound: target for bound, target in _imports(statement) if bound}
            elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                self.definitions[statement.name] = statement
            elif isinstance(statement, ast.Assign | ast.AnnAssign):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                for each in (node for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)):
                    self.definitions[each.id] = statement
        self.digest = hashlib.sha256(ast.unparse(self.tree).encode()).hexdigest()
        self.modules = _modules_of(_imports(self.tree), self.tree)


def _module(name: str) -> _Module:
    return _parsed(name, _state(name))


@functools.cache
def _parsed(name: str, state: tuple[str, int, int]) -> _Module:
    return _Module(name)


def _modules_of(bound: list[tuple[str, str]], tree: ast.AST) -> set[str]:
    """The modules of the package behind some names: a module itself, the module that a member is of, submodules of `engine`."""
    found = set()
    for name, target in bound:
        if target == f"{PACKAGE}.engine":
            found |= {f"{target}.{attribute}" for attribute in _attributes(tree, name)}
        else:
            found.add(target if _exists(target) else target.rpartition(".")[0])
    return {each for each in found if _exists(each) and each not in (PACKAGE, f"{PACKAGE}.engine")}


def _closure(name: str) -> set[str]:
    """The module and every module of the package that it imports, anywhere in it, and so on."""
    found: set[str] = set()
    waiting = {name}
    while waiting:
        each = waiting.pop()
        found.add(each)
        waiting |= _module(each).modules - found
    return found


def _imports(tree: ast.AST) -> list[tuple[str, str]]:
    """What the imports within `tree` bind, each with its target in this package; imports for type checkers do not run."""
    found = []
    body = tree.body if isinstance(tree, ast.Module) else [tree]
    for statement in _executed(body):
        for node in ast.walk(statement):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == PACKAGE:
                found += [(each.asname or each.name, f"{node.module}.{each.name}") for each in node.names]
            elif isinstance(node, ast.Import):
                found += [(each.asname or PACKAGE, each.name) for each in node.names if each.name.partition(".")[0] == PACKAGE]
    return found


def _used(definition: ast.stmt) -> set[str]:
    """The names that a definition takes from its module; a parameter of a node has the name of another node, and is not it."""
    names = {each.id for each in ast.walk(definition) if isinstance(each, ast.Name)}
    if not isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef):
        return names
    around: list[ast.AST | None] = [*definition.decorator_list, definition.args, definition.returns]
    taken = {each.id for part in around if part is not None for each in ast.walk(part) if isinstance(each, ast.Name)}
    arguments = definition.args
    parameters = {each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    return (names - parameters) | taken


def _attributes(tree: ast.AST, name: str) -> set[str]:
    """The attributes of `name` that are used within `tree`."""
    return {
        each.attr
        for each in ast.walk(tree)
        if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == name
    }


def _executed(body: list[Any]) -> Iterator[Any]:
    """The statements but for what stands under `if TYPE_CHECKING`; of a `with` those in its block."""
    for statement in body:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from statement.orelse
        elif isinstance(statement, ast.With):
            yield from _executed(statement.body)
        else:
            yield statement


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def _exists(name: str) -> bool:
    return _find(name) is not None


def _find(name: str) -> Path | None:
    """The file of a module: where it was loaded from, which for a name may be another place later; else where it would be."""
    loaded = getattr(sys.modules.get(name), "__file__", None)
    return Path(loaded) if loaded is not None else _searched(name)


@functools.cache
def _searched(name: str) -> Path | None:
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(found.origin) if found is not None and found.origin is not None else None


def _path(name: str) -> Path:
    path = _find(name)
    assert path is not None, name
    return path


def _state(name: str) -> tuple[str, int, int]:
    path = _path(name)
    status = path.stat()
    return str(path), status.st_mtime_ns, status.st_size


@functools.cache
def _library_versions() -> str:
    import importlib.metadata

    return repr([(name, importlib.metadata.version(name)) for name in LIBRARIES])
