import inspect
import re
from collections import Counter
from pathlib import Path

import pytest

from finetune_dataflow.cli.graph import dot_source
from finetune_dataflow.cli.inputs import markdown
from finetune_dataflow.cli.options import build_driver, graph_inputs
from finetune_dataflow.engine import drawing
from finetune_dataflow.errors import UserError
from finetune_dataflow.start import STARTS

REPOSITORY = Path(__file__).parent.parent
FIT_NODES = {"finished_fit", "fit_settings", "training_history", "adapter_path"}


def ancestors(start: str, name: str) -> set[str]:
    """Everything the node depends on, inputs included."""
    nodes, found, waiting = build_driver(start).graph.nodes, set(), [name]
    while waiting:
        for dependency in nodes[waiting.pop()].dependencies:
            if dependency.name not in found:
                found.add(dependency.name)
                waiting.append(dependency.name)
    return found


@pytest.mark.parametrize("start", STARTS)
def test_every_node_is_documented_and_fits_a_screen(start: str) -> None:
    for node in build_driver(start).graph.nodes.values():
        if not node.user_defined:
            for function in node.originating_functions:
                assert inspect.getdoc(function), f"{node.name} has no docstring"
                body = inspect.getsource(function)
                code = re.sub(r'"""(.|\n)*?"""', "", body).strip().splitlines()
                assert len(code) <= 50, f"{node.name} is {len(code)} lines long"
            unfilled = re.findall(r"{(rows|tokens|replies|conversations|base_scores|tuned_scores)}", node.documentation or "")
            assert not unfilled, f"{node.name}: an unfilled name in its documentation"


@pytest.mark.parametrize("start", STARTS)
def test_every_input_enters_at_one_node_and_is_explained_there(start: str) -> None:
    nodes = build_driver(start).graph.nodes.values()
    owners = Counter(d.name for node in nodes for d in node.dependencies if d.user_defined and d.name != "start")
    assert {name: count for name, count in owners.items() if count > 1} == {}
    unexplained = [each.name for each in graph_inputs(build_driver(start)).values() if not each.meaning]
    assert unexplained == []


@pytest.mark.parametrize(
    "name", ["save_best_models", "hold_out_set_predictions", "finetuned_model_on_validation_set", "run_metrics"]
)
def test_what_is_saved_and_predicted_comes_after_the_fit(name: str) -> None:
    assert "finished_fit" in ancestors("base", name)


def test_the_presaved_graph_has_no_training_node() -> None:
    assert FIT_NODES.isdisjoint(node.name for node in build_driver("presaved").graph.nodes.values() if not node.user_defined)
    assert "run_directory" not in ancestors("presaved", "save_best_models")


def test_nothing_before_the_fit_takes_the_output_directory() -> None:
    nodes = build_driver("base").graph.nodes
    assert [each.name for each in nodes["output_dir"].depended_on_by] == ["finished_fit"]
    assert all("output_dir" not in ancestors("base", name) for name in ancestors("base", "finished_fit") - {"output_dir"})


def test_generation_settings_do_not_touch_the_fit() -> None:
    assert "generation_settings" not in ancestors("base", "finished_fit")


def test_the_hold_out_decides_nothing() -> None:
    assert not {name for name in ancestors("base", "adapter_path") if "hold_out" in name}


@pytest.mark.parametrize("config", [{}, {"start": "bse"}, {"start": None}])
def test_a_missing_or_unknown_start_names_the_two(config: dict[str, object]) -> None:
    from hamilton import driver

    import finetune_dataflow

    with pytest.raises(UserError, match=r'"base" .* "presaved"'):
        driver.Builder().with_config(config).with_modules(finetune_dataflow).build()


def test_the_pictures_in_the_docs_are_those_of_the_graph() -> None:
    """`make graph` draws them anew. The titles of an SVG's nodes and edges are its source."""
    for start in STARTS:
        shipped = (REPOSITORY / "docs" / f"dag-{start}.svg").read_text(encoding="utf-8")
        drawn = drawing.svg(dot_source(start))
        titles = [sorted(re.findall(r"<title>(.*?)</title>", svg)) for svg in (shipped, drawn)]
        texts = [sorted(re.findall(r"<text.*?>(.*?)</text>", svg)) for svg in (shipped, drawn)]
        assert titles[0] == titles[1] and texts[0] == texts[1], f"docs/dag-{start}.svg is out of date: run make graph"


def test_a_drawing_is_the_same_on_every_call() -> None:
    assert dot_source("base") == dot_source("base")


def test_the_input_table_in_the_docs_is_that_of_the_graph() -> None:
    shipped = (REPOSITORY / "docs" / "inputs.md").read_text(encoding="utf-8")
    assert shipped == markdown(), "docs/inputs.md is out of date: run make graph"


def test_a_default_of_the_graph_stands_in_the_table() -> None:
    assert "| `train_size` | float | `0.8` | base presaved | The share of all rows to train on. |" in markdown()
