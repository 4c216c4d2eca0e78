"""The folder for Hamilton's contrib hub: its flat module makes the package's graph, and Hamilton's own functions take it.

Also what `make publish-check` looks for in a wheel. The whole of it runs in tests_full/test_publish.py.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hamilton import contrib as hamilton_contrib
from hamilton import dataflows, driver

import finetune_dataflow
from finetune_dataflow.engine import code_versions
from finetune_dataflow.engine.drawing import svg
from finetune_dataflow.errors import UserError
from finetune_dataflow.start import STARTS

sys.path.insert(0, str(Path(__file__).parent.parent / "publish"))

import contrib
import distributions
import installed
from flat_module import formatted
from graphs import differences, graph
from png import png

FILES = ["README.md", "__init__.py", "dag.png", "requirements.txt", "tags.json", "valid_configs.jsonl"]
OUTPUTS = installed.OUTPUTS
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a user, built."""
    return contrib.build(tmp_path_factory.mktemp("contrib"), "some_one")


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hamilton's directory of pulled dataflows, with the folder in it."""
    for name in ("DATAFLOW_FOLDER", "USER_PATH", "OFFICIAL_PATH"):
        monkeypatch.setattr(dataflows, name, getattr(dataflows, name))
    monkeypatch.setattr(dataflows, "_get_request", lambda url: pytest.fail(f"the network was asked for {url}"))
    installed.point_hub_at(tmp_path / "hub")
    place = installed.place_of(tmp_path / "hub", "some_one")
    place.parent.mkdir(parents=True)
    place.symlink_to(folder)
    return tmp_path / "hub"


@pytest.fixture
def flat(hub: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The dataflow as Hamilton imports it."""
    monkeypatch.setitem(sys.modules, contrib.NAME, ModuleType(contrib.NAME))  # so that it is gone afterwards
    del sys.modules[contrib.NAME]
    yield dataflows.import_module(contrib.NAME, "some_one", version="local")


@pytest.fixture
def variant(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], ModuleType]:
    """The flat module with one text in it changed."""

    def changed(old: str, new: str) -> ModuleType:
        text = (folder / contrib.NAME / "__init__.py").read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the module"
        path = tmp_path / f"variant{len([*tmp_path.glob('variant*')])}.py"
        path.write_text(text.replace(old, new), encoding="utf-8")
        monkeypatch.setitem(sys.modules, contrib.NAME, ModuleType(contrib.NAME))
        return installed.loaded(contrib.NAME, path)

    return changed


def functions(module: ModuleType, start: str) -> dict[str, Any]:
    """The nodes of a module's graph that are made by functions, as Hamilton's cache sees them."""
    dr = driver.Builder().with_config({"start": start}).with_modules(module).build()
    return {each.name: each for each in dr.list_available_variables() if each.originating_functions}


def code(function: Callable[..., Any]) -> str:
    """The code of a node, without its decorators and docstring."""
    found = parsed(Path(function.__code__.co_filename))[function.__code__.co_name]
    found.decorator_list = []
    return ast.unparse(found)


@functools.cache
def parsed(path: Path) -> dict[str, ast.FunctionDef]:
    """The functions of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {each.name: each for each in tree.body if isinstance(each, ast.FunctionDef)}


def test_the_folder_holds_what_the_hub_asks_for(folder: Path) -> None:
    assert sorted(each.name for each in folder.iterdir()) == ["author.md", "fine_tuning_mlx"]
    assert sorted(each.name for each in (folder / "fine_tuning_mlx").iterdir()) == FILES
    assert "https://github.com/some-one" in (folder / "author.md").read_text()
    assert not re.search(r"\$\w", "".join(each.read_text() for each in folder.rglob("*.md")))


@pytest.mark.parametrize("start", STARTS)
def test_the_flat_module_makes_the_graph_of_the_package_node_for_node(flat: ModuleType, start: str) -> None:
    assert differences(flat, start) == []
    nodes = graph(flat, start)
    assert len(nodes) > 80 and nodes["hold_out_tokens"]["functions"] == ["set_tokens"]
    tags = {"stage": "export", "cost": "light", "artifact": "metrics.json"}
    assert tags.items() <= nodes["metrics_file"]["tags"].items()
    variants = {"base": "evaluated_adapter__base", "presaved": "evaluated_adapter__presaved"}
    assert nodes["evaluated_adapter"]["functions"] == [variants[start]]


@pytest.mark.parametrize("start", STARTS)
def test_every_node_has_the_code_that_it_has_in_the_package(flat: ModuleType, start: str) -> None:
    ours, theirs = (functions(each, start) for each in (finetune_dataflow, flat))
    pairs = [(ours[name].originating_functions[0], theirs[name].originating_functions[0]) for name in ours]
    assert len(pairs) > 60 and all(code(one) == code(other) for one, other in pairs)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("strict: bool = False", "strict: bool = True", "base: the defaults of data_quality is {'strict': 'True'}"),
        ("    max_tokens: int = 100,", "    max_tokens: int,", "base: the required of generation_settings is ['max_tokens',"),
        ("    epochs: float | None", "    epochs: int | None", "base: the type of epochs is 'int | None'"),
        ('"""The records that are trained on."""', '"""Some records."""', "base: the documentation of train_set is 'Some"),
        ("def row_ledger_file(", "def ledger_file(", "base: the kind of row_ledger_file is 'input'"),
        ("def lineage_file(", "def ancestry_file(", "base: lineage_file is in the package alone"),
        ('validation_tokens={"conversations"', 'valid_tokens={"conversations"', "base: valid_tokens is in the module alone"),
        ('artifact="metrics.json")', 'artifact="other.json")', "base: the tags of metrics_file is {"),
        ("def verdict(\n    hold_out_comparison:", "def verdict(\n    validation_comparison:", "base: the takes of verdict is {"),
        ("def run_directory__base(", "def run_directory__presaved(", "base: the functions of run_directory is ['run_dir"),
    ],
)  # fmt: skip
def test_a_difference_is_found_and_named(variant: Callable[[str, str], ModuleType], old: str, new: str, said: str) -> None:
    found = differences(variant(old, new), "base")
    assert any(line.startswith(said) for line in found), "\n".join(found)


def test_hamilton_takes_the_dataflow_and_a_copy_of_it(flat: ModuleType, tmp_path: Path) -> None:
    assert installed.hub_problems(flat, "some_one", contrib.NAME, tmp_path) == []


def test_it_is_imported_as_a_part_of_the_contrib_package_too(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    above = hub / dataflows.COMMON_PATH.format(commit_ish="local")
    monkeypatch.setattr(hamilton_contrib, "__path__", [str(above)])
    module = importlib.import_module("hamilton.contrib.user.some_one.fine_tuning_mlx")
    for name in [each for each in sys.modules if each.startswith("hamilton.contrib.user")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert differences(module, "base") == []


def test_the_flat_module_runs_and_a_finished_run_of_the_package_is_its_own(
    flat: ModuleType, inputs: dict[str, Any], rows: list[dict[str, str]]
) -> None:
    made = installed.fixed_call(finetune_dataflow, "base", inputs)
    weights = made["save_best_models"]["weights"]
    before = weights.stat().st_mtime_ns
    again = installed.fixed_call(flat, "base", {**inputs, "reuse_replies": False})
    assert again == made and weights.stat().st_mtime_ns == before
    assert installed.problems("base", again, rows) == []
    config = {"start": "base"}
    drawn = driver.Builder().with_config(config).with_modules(flat).build().execute(["dag_drawing"], inputs=inputs)
    ours = driver.Builder().with_config(config).with_modules(finetune_dataflow).build().execute(["dag_drawing"], inputs=inputs)
    titles = [sorted(re.findall(r"<title>(.*?)</title>", each["dag_drawing"])) for each in (drawn, ours)]
    assert titles[0] == titles[1] and len(titles[0]) > 200


def test_results_that_lack_something_are_told(rows: list[dict[str, str]], tmp_path: Path) -> None:
    scores = {"validation_loss": 2.0, "validation_perplexity": 7.4, "rouge1": 0.5, "rouge2": 0.3, "rougeL": 0.4, "rougeLsum": 0.4}
    paths = {"adapter": tmp_path, "config": tmp_path / "adapter_config.json"}
    paths["config"].write_text("{}")
    replies = {"validation_predictions": ["It."], "validation_references": [rows[1]["reply"]]}
    presaved: dict[str, Any] = {
        "save_best_models": paths,
        "hold_out_set_predictions": [(rows[0]["question"], "It is.")],
        "training_and_validation_set_metrics": scores,
        "finetuned_model_on_validation_set": replies,
    }
    base = {**presaved, "training_and_validation_set_metrics": {"train_loss": 2.1, **scores}}
    assert installed.problems("base", base, rows) == installed.problems("presaved", presaved, rows) == []
    damaged: list[dict[str, Any]] = [
        {"training_and_validation_set_metrics": {"train_loss": 2.1, **scores}},
        {"training_and_validation_set_metrics": {**scores, "rouge1": float("nan")}},
        {"training_and_validation_set_metrics": {**scores, "rouge1": 1}},
        {"hold_out_set_predictions": [("not in the file", "said")]},
        {"hold_out_set_predictions": []},
        {"save_best_models": {**paths, "weights": tmp_path / "nowhere"}},
        {"save_best_models": {"config": paths["config"], "adapter": tmp_path}},
        {"finetuned_model_on_validation_set": {"validation_predictions": [], "validation_references": []}},
        {"finetuned_model_on_validation_set": {**replies, "validation_references": ["not in the file"]}},
    ]
    assert [len(installed.problems("presaved", {**presaved, **each}, rows)) for each in damaged] == [1] * 9
    assert len(installed.problems("base", presaved, rows)) == 1


def test_the_cache_serves_the_flat_module_and_computes_nothing_twice(
    flat: ModuleType, inputs: dict[str, Any], tmp_path: Path
) -> None:
    from tests.cached_runs import ANEW, executed

    def cached() -> driver.Driver:
        builder = driver.Builder().with_config({"start": "base"}).with_modules(flat)
        return builder.with_cache(path=str(tmp_path / "cache")).build()

    first, second = cached(), cached()
    made = first.execute(OUTPUTS, inputs=inputs)
    assert {"train_tokens", "hold_out_tuned_replies", "training_and_validation_set_metrics"} <= executed(first)
    assert second.execute(OUTPUTS, inputs=inputs) == made
    assert executed(second) <= ANEW
    third = cached()
    third.execute(OUTPUTS, inputs={**inputs, "max_tokens": 5})
    ran = executed(third) - ANEW
    assert "hold_out_tuned_replies" in ran and "train_tokens" not in ran


def test_versions_in_the_cache_know_the_engine(flat: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: each.version for name, each in functions(flat, "base").items()}
    plain = code_versions._module

    def with_other_losses(name: str) -> Any:
        module = plain(name)
        if name != "finetune_dataflow.engine.losses":
            return module
        other = object.__new__(type(module))
        other.__dict__.update({**vars(module), "digest": "another"})
        return other

    monkeypatch.setattr(code_versions, "_module", with_other_losses)
    after = {name: each.version for name, each in functions(flat, "base").items()}
    changed = {name for name in before if before[name] != after[name]}
    assert {"hold_out_base_losses", "validation_tuned_losses", "finished_fit"} <= changed
    assert {"split_settings", "records", "train_set", "verdict"}.isdisjoint(changed)


def test_versions_in_the_cache_cover_the_modules_that_they_cover_in_the_package(flat: ModuleType) -> None:
    stages = {f"finetune_dataflow.{name}" for name in finetune_dataflow.NODES}
    ours, theirs = (functions(each, "base") for each in (finetune_dataflow, flat))
    covered = {name: code_versions.code_of(each.originating_functions[0])[1] for name, each in theirs.items()}
    for name, each in ours.items():
        modules = code_versions.code_of(each.originating_functions[0])[1]
        if modules.isdisjoint(stages):  # else the package reads a whole module of nodes for one class
            assert covered[name] == modules, name
        assert covered[name] <= modules, name
    assert "finetune_dataflow.engine.rouge" in covered["hold_out_base_scores"]


def test_a_changed_helper_of_the_flat_module_makes_other_versions(
    flat: ModuleType, variant: Callable[[str, str], ModuleType]
) -> None:
    before = {name: each.version for name, each in functions(flat, "base").items()}
    changed = variant('            "ended": [each.ended for each in found],', '            "ended": [True for each in found],')
    after = {name: each.version for name, each in functions(changed, "base").items()}
    assert {name for name in before if before[name] != after[name]} == {
        "validation_base_replies", "hold_out_base_replies", "validation_tuned_replies", "hold_out_tuned_replies",
    }  # fmt: skip


def test_the_source_passes_the_linter_and_the_formatter(folder: Path) -> None:
    text = (folder / contrib.NAME / "__init__.py").read_text(encoding="utf-8")
    assert formatted(text) == text
    with pytest.raises(UserError, match="undefined"):
        formatted("def f() -> int:\n    return undefined\n")


def test_the_source_reads_as_a_module_of_the_hub_does(folder: Path) -> None:
    text = (folder / contrib.NAME / "__init__.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert f"# Made from finetune_dataflow {finetune_dataflow.__version__} by" in text
    assert "with_modules(fine_tuning_mlx)" in (ast.get_docstring(tree) or "")
    block = next(each for each in tree.body if isinstance(each, ast.With))
    assert ast.unparse(block.items[0]) == "contrib.catch_import_errors(__name__, __file__, logger)"
    assert all(isinstance(each, ast.Import | ast.ImportFrom) for each in block.body)
    named = [each for each in ast.walk(tree) if isinstance(each, ast.ImportFrom) and each.module]
    assert {each.module.partition(".")[0] for each in named if each not in block.body and each.module} == {
        "__future__", "collections", "contextlib", "dataclasses", "pathlib", "typing", "hamilton", "finetune_dataflow",
    }  # fmt: skip
    classes = [each.name for each in tree.body if isinstance(each, ast.ClassDef)]
    assert classes == ["DataSource", "FinishedFit"]
    nodes = [each.name for each in tree.body if isinstance(each, ast.FunctionDef) and not each.name.startswith("_")]
    assert nodes == [name for names in finetune_dataflow.NODES.values() for name in names]


def test_a_missing_engine_is_told_with_the_way_to_install_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "finetune_dataflow", None)  # as if it were not installed
    with pytest.raises(ImportError, match="finetune_dataflow"):
        installed.loaded("without_engine", folder / contrib.NAME / "__init__.py")
    assert f"pip install -r {folder / contrib.NAME}/requirements.txt" in caplog.text


def test_the_requirement_is_this_version_in_a_form_that_hamilton_understands(folder: Path) -> None:
    version = finetune_dataflow.__version__
    text = (folder / contrib.NAME / "requirements.txt").read_text()
    assert text == f"finetune-dataflow>={version},<={version}\n"
    from packaging.requirements import Requirement

    specifier = Requirement(text.strip()).specifier
    assert [each for each in ("0.0.9", version, f"{version}.post1", "99") if each in specifier] == [version]


def test_the_configurations_are_the_two_starts(folder: Path) -> None:
    lines = (folder / contrib.NAME / "valid_configs.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"start": "base"}, {"start": "presaved"}]


def test_the_tags_have_the_hubs_form(folder: Path) -> None:
    tags = json.loads((folder / contrib.NAME / "tags.json").read_text())
    assert list(tags) == ["schema", "use_case_tags", "secondary_tags"] and tags["schema"] == "1.0"
    assert tags["use_case_tags"] and all(isinstance(each, str) for each in tags["use_case_tags"])
    assert tags["secondary_tags"] == {"language": "English"}


def test_the_readme_has_the_hubs_headings_and_nothing_that_its_pages_cannot_show(folder: Path) -> None:
    text = (folder / contrib.NAME / "README.md").read_text(encoding="utf-8")
    prose = re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    assert re.findall(r"^# .*", prose, re.MULTILINE) == [
        "# Purpose of this module", "# Configuration Options", "# Limitations",
    ]  # fmt: skip
    assert not re.search(r"[{}<]", prose), "the hub's pages are MDX, where these begin code"
    assert distributions.relative_links(text) == []


@pytest.mark.parametrize("page", ["publish/README-contrib.md", "publish/README-package.md", "README.md"])
def test_every_readme_has_the_fixed_call(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8").replace("$name", contrib.NAME)
    blocks = [each for each in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if "execute" in each]
    assert len(blocks) == 1
    called = next(
        each for each in ast.walk(ast.parse(blocks[0])) if isinstance(each, ast.Call) and "execute" in ast.unparse(each)
    )
    assert ast.literal_eval(called.args[0]) == OUTPUTS
    assert ast.literal_eval(called.keywords[0].value) == {
        "data_path": "example-support-dataset.json", "input_text_key": "question", "output_text_key": "reply",
    }  # fmt: skip


def test_the_picture_is_the_graph(folder: Path) -> None:
    from PIL import Image

    path = folder / contrib.NAME / "dag.png"
    shipped = (REPOSITORY / "docs" / "dag-base.svg").read_text(encoding="utf-8")
    width, height = re.findall(r"viewBox=\"0.00 0.00 (\d+)\.\d+ (\d+)\.\d+\"", shipped)[0]
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", path.read_bytes()[16:24]) == (int(width), int(height))
    assert path.stat().st_size < 2_000_000
    place = re.search(r'text-anchor="middle" x="([\d.]+)" y="-([\d.]+)"[^>]*>verdict<', shipped)
    shift = re.search(r"translate\(([\d.]+) ([\d.]+)\)", shipped)
    assert place is not None and shift is not None
    x, y = float(place[1]) + float(shift[1]), float(shift[2]) - float(place[2])
    with Image.open(path) as opened:
        shades = opened.convert("L").crop((int(x) - 20, int(y) - 10, int(x) + 20, int(y) + 1)).tobytes()
    assert min(shades) < 60 and max(shades) > 190, "the node's name is not written on its colour"


def test_a_drawing_is_painted_where_and_as_it_is_drawn() -> None:
    from io import BytesIO

    from PIL import Image

    drawing = svg('digraph { graph [margin=0 pad=0]; a [shape=box style=filled fillcolor="#ff0000" label="" width=1 height=1] }')
    with Image.open(BytesIO(png(drawing))) as opened:
        wide, high = opened.size
        red, green, blue = (each.tobytes() for each in opened.convert("RGB").split())
    middle = slice(36 * wide, 37 * wide)
    assert (wide, high) == (72, 72) and (red[middle][36], green[middle][36], blue[middle][36]) == (255, 0, 0)
    dark = [x for x, shade in enumerate(red[middle]) if shade < 100]
    assert dark and all(x < 3 or x > wide - 4 for x in dark), "the border is not where it should be"


@pytest.mark.parametrize("user", ["with-hyphen", "1st", "class", "", "../up"])
def test_a_user_that_is_no_python_name_is_refused(user: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no Python name"):
        contrib.build(tmp_path, user)
    assert [*tmp_path.iterdir()] == []


def test_the_command_says_where_the_folder_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert contrib.main([str(tmp_path), "--user", "no-name"]) == 2
    assert "Error: --user 'no-name'" in capsys.readouterr().err


GOOD_METADATA = f"""\
Metadata-Version: 2.4
Name: finetune-dataflow
Version: {finetune_dataflow.__version__}
Summary: Short.
License-Expression: Apache-2.0
License-File: LICENSE
Description-Content-Type: text/markdown

# Title

[text](https://example.org), `[code](x.md)`, ![picture](https://example.org/x.png), [below](#title)
"""


def write_wheel(path: Path, changed: Mapping[str, str | None] | None = None) -> Path:
    """A wheel of this package; a name with None is left out, one with a text is put in."""
    package = REPOSITORY / "finetune_dataflow"
    files: dict[str, str | None] = {
        each.relative_to(REPOSITORY).as_posix(): each.read_text(encoding="utf-8")
        for each in package.rglob("*")
        if each.is_file() and "__pycache__" not in each.parts
    }
    info = "finetune_dataflow-0.dist-info"
    files |= {f"{info}/METADATA": GOOD_METADATA, f"{info}/licenses/LICENSE": "text"}
    files[f"{info}/entry_points.txt"] = "[console_scripts]\nfinetune-dataflow = finetune_dataflow.cli:main\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**files, **(changed or {})}.items():
            if text is not None:
                archive.writestr(name, text)
    return path


def test_a_wheel_with_all_that_belongs_in_it_has_no_problem(tmp_path: Path) -> None:
    assert distributions.wheel_problems(write_wheel(tmp_path / "a.whl")) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"finetune_dataflow/engine/page_assets/page.css": None}, "finetune_dataflow/engine/page_assets/page.css is not in it"),
        ({"finetune_dataflow/cli/modules.py": None}, "finetune_dataflow/cli/modules.py is not in it"),
        ({"tests/test_cli.py": "x"}, "tests/test_cli.py should not be in it"),
        ({"finetune_dataflow/gone.py": "x"}, "finetune_dataflow/gone.py should not be in it"),
        ({"finetune_dataflow-0.dist-info/licenses/LICENSE": None}, "the licence is not in it"),
        ({"finetune_dataflow-0.dist-info/entry_points.txt": ""}, "the console script"),
    ],
)
def test_a_wheel_that_lacks_something_or_has_too_much_is_told(changed: dict[str, str | None], said: str, tmp_path: Path) -> None:
    found = distributions.wheel_problems(write_wheel(tmp_path / "a.whl", changed))
    assert len(found) == 1 and said in found[0]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[text](https://example.org)", "[text](docs/data.md)", "leads to docs/data.md, which is not there on an index"),
        ("![picture](https://example.org/x.png)", '<img src="docs/x.png">', "leads to docs/x.png"),
        ("# Title", "[name]: docs/data.md", "leads to docs/data.md"),
        ("License-Expression: Apache-2.0\n", "", "License-Expression is None, expected 'Apache-2.0'"),
        ("text/markdown", "text/plain", "Description-Content-Type is 'text/plain'"),
        ("Summary: Short.\n", "", "the summary or the long description is missing"),
    ],
)
def test_metadata_that_an_index_would_show_wrongly_is_told(old: str, new: str, said: str) -> None:
    found = distributions.metadata_problems(GOOD_METADATA.replace(old, new))
    assert len(found) == 1 and said in found[0]


def test_an_old_setuptools_is_refused() -> None:
    distributions.check_setuptools("77.0.1")
    with pytest.raises(UserError, match=r"setuptools 65\.5\.0 is too old .* Expected 77 or newer"):
        distributions.check_setuptools("65.5.0")


def test_a_release_is_made_of_what_git_knows_of(tmp_path: Path) -> None:
    copied = distributions.copied(tmp_path / "source")
    listed = subprocess.run(["git", "ls-files", "finetune_dataflow"], cwd=REPOSITORY, capture_output=True, text=True).stdout
    assert {each for each in listed.split() if (REPOSITORY / each).exists()} <= {
        each.relative_to(copied).as_posix() for each in copied.rglob("*") if each.is_file()
    }
    assert not (copied / ".venv").exists() and not (copied / "runs").exists()
