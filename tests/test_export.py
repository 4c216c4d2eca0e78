from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import yaml

from finetune_dataflow.cli import main
from finetune_dataflow.engine.chat import Conversation, load_encoder
from finetune_dataflow.engine.generation import replies
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.rouge import rouge_by_row
from finetune_dataflow.engine.settings import GenerationSettings
from finetune_dataflow.exports import building
from finetune_dataflow.exports.gate import Reference
from finetune_dataflow.exports.rows import GateRow
from finetune_dataflow.exports.settings import GateSettings
from tests.architectures import write_architecture
from tests.test_gguf_writer import write_model

Exported = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The user's cache is out of reach."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FINETUNE_DATAFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama whose tokenizer has merges, as GGUF wants it."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny", "llama")


@pytest.fixture(scope="module")
def run(data_file: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny model."""
    out = tmp_path_factory.mktemp("runs") / "run"
    named = ["--data", str(data_file), "--input-text-key", "question", "--output-text-key", "reply", "--model", str(tiny_model)]
    settings = ["--num-layers", "2", "--max-tokens", "8", "--epochs", "2", "--learning-rate", "0.01", "--out", str(out)]
    assert main([*named, *settings]) == 0
    return out


def exported(run: Path, out: Path, *options: str) -> Exported:
    assert main(["export", "--adapter", str(run / "adapters"), "--out", str(out), *options]) == 0
    found: Exported = json.loads((out / "export.json").read_text())
    return found


def names(directory: Path) -> set[str]:
    return {each.name for each in directory.iterdir()}


def log_probabilities(model: Any, ids: list[int]) -> np.ndarray:
    logits = np.array(model(mx.array([ids]))[0].astype(mx.float32), dtype=np.float64)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("options", "files"),
    [
        (("fused",), {"model.safetensors", "config.json", "fusion.json", "README.md"}),
        (("peft",), {"adapter_model.safetensors", "adapter_config.json", "README.md"}),
        (("gguf",), {"out-f16.gguf", "README.md"}),
        (("gguf-lora",), {"out-lora.gguf", "README.md"}),
        (("ollama", "--ollama-name", "support"), {"model.gguf", "Modelfile", "README.md", "MODEL_CARD.md"}),
        (("ollama", "--ollama-base", "tiny"), {"adapter.gguf", "Modelfile", "README.md", "MODEL_CARD.md"}),
    ],
    ids=lambda each: "-".join(each) if isinstance(each, tuple) else "",
)
def test_each_kind_is_written_read_back_and_answers_as_the_adapter_does(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], files: set[str]
) -> None:
    found = exported(run, tmp_path / "out", "--to", *options, "--gate-rows", "4")
    assert names(tmp_path / "out") >= {*files, "export.json"} and names(tmp_path) == {"out"}
    (scores,) = found["gate"]["scores"]
    assert scores["reader"].startswith("mlx-lm") and (scores["rows"], scores["same_replies"]) == (4, 4)
    assert scores["kl_max"] < 1e-5 and scores["top1"] == 1.0 and found["gate"]["failures"] == []
    assert "4 of 4" in capsys.readouterr().out


def test_the_table_is_what_the_two_models_give_by_plain_arithmetic(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    found = exported(run, tmp_path / "out", "--to", "gguf", "--gguf-type", "q8_0", "--gate-rows", "100", "--force")
    encoder = load_encoder(tiny_model)
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    prompts = [encoder.prompt_ids([{"role": "user", "content": row["input"]}]) for row in rows]
    read = tmp_path / "read"
    from finetune_dataflow.engine.gguf import convert_gguf

    convert_gguf(tmp_path / "out" / "out-q8_0.gguf", read)
    adapter, export = load_model(tiny_model, run / "adapters"), load_model(read)
    divergences, same = [], []
    for row, prompt in zip(rows, prompts, strict=True):
        ids = [*prompt, *encoder.reply_ids(row["reference"])]
        p, q = (log_probabilities(model, ids)[len(prompt) - 1 : -1] for model in (adapter, export))
        divergences += (np.exp(p) * (p - q)).sum(axis=1).tolist()
        same += (p.argmax(axis=1) == q.argmax(axis=1)).tolist()
    settings = GenerationSettings(max_tokens=8, generation_batch_size=4)
    texts = [
        [encoder.reply_text(each.token_ids) for each in replies(base, tuned, prompts, encoder, settings)]
        for base, tuned in ((tiny_model, run / "adapters"), (read, None))
    ]
    references = [row["reference"] for row in rows]
    (scores,) = found["gate"]["scores"]
    assert scores["rows"] == len(rows) and scores["places"] == len(divergences)
    assert scores["kl_mean"] == pytest.approx(np.mean(divergences), rel=1e-3) and scores["kl_mean"] > 1e-9
    assert scores["kl_max"] == pytest.approx(max(divergences), rel=2e-2)
    assert scores["top1"] == pytest.approx(np.mean(same), abs=1e-6)
    assert scores["score_adapter"] == pytest.approx(rouge_by_row(texts[0], references)["rougeL"].mean())
    assert scores["score_export"] == pytest.approx(rouge_by_row(texts[1], references)["rougeL"].mean())
    assert scores["same_replies"] == sum(one == other for one, other in zip(*texts, strict=True))


def test_an_export_that_lost_what_was_learned_is_refused_and_leaves_nothing(
    run: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetting(base: Path, adapter: Path, out: Path, **options: Any) -> Any:
        """A fusing that gives the base model."""
        report = plain(base, adapter, out, **options)
        shutil.copyfile(tiny_model / "model.safetensors", out / "model.safetensors")
        return report

    plain = building.fuse
    monkeypatch.setattr(building, "fuse", forgetting)
    command = ["export", "--adapter", str(run / "adapters"), "--to", "fused", "--out", str(tmp_path / "out"), "--gate-rows", "4"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "does not do what the adapter-loaded model does" in said and "KL divergence" in said and "(max_kl)" in said
    assert names(tmp_path) == set()
    assert main([*command, "--force"]) == 0
    assert "although it does not reach the gate" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**It does not reach this, and was written all the same:**" in card


def test_an_earlier_export_is_replaced_and_one_that_fails_leaves_it(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exported(run, out, "--to", "peft", "--gate-rows", "2")
    before = (out / "export.json").read_text()
    command = ["export", "--adapter", str(run / "adapters"), "--out", str(out), "--gate-rows", "2"]
    assert main([*command, "--to", "gguf", "--gguf-type", "q8_0", "--max-kl", "0"]) == 2
    assert (out / "export.json").read_text() == before and names(tmp_path) == {"out"}
    exported(run, out, "--to", "gguf", "--gate-rows", "2")
    assert not (out / "adapter_config.json").exists() and (out / "out-f16.gguf").is_file()


def test_the_card_has_lineage_verdict_licence_and_use_and_no_text_of_the_data(
    run: Path, tmp_path: Path, rows: list[dict[str, str]]
) -> None:
    exported(run, tmp_path / "out", "--to", "peft", "--gate-rows", "2", "--license", "mit", "--base-name", "someone/tiny",
             "--intended-use", "For <b>tests</b> | only\n# not a heading")  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "mit" and front["library_name"] == "peft" and "lora" in front["tags"]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["verdict"][:40] in card and "For &lt;b&gt;tests&lt;/b&gt; \\| only \\# not a heading" in card
    lineage = json.loads((run / "lineage.json").read_text())
    for name in ("adapter", "dataset"):
        assert f"`{lineage[name]}`" in card
    assert lineage["fingerprints"]["base_model"] in card and "| training rows | 48 |" in card
    assert not any(row["question"] in card or row["reply"] in card for row in rows)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/tiny"
    assert front["base_model"] == "someone/tiny"


def test_what_is_pushed_names_no_place_of_this_machine(run: Path, tmp_path: Path) -> None:
    for kind in ("fused", "gguf", "peft"):
        named = ["--hub-kind", kind, "--hub-id", "someone/tiny-tuned", "--dry-run", "--gate-rows", "2"]
        exported(run, tmp_path / kind, "--to", "hub", *named, *(["--base-name", "someone/tiny"] if kind == "peft" else []))
        for path in (tmp_path / kind).iterdir():
            assert str(tmp_path.parent).encode() not in path.read_bytes(), path
        assert not (tmp_path / kind / "used_inputs.txt").exists()


@pytest.mark.parametrize(("how", "loads_in"), [("dequantize", "mlx-lm and transformers"), ("requantize", "mlx-lm")])
def test_a_quantised_base_is_fused_either_way_and_keeps_what_was_learned(
    run: Path, data_file: Path, tiny_model: Path, tmp_path: Path, how: str, loads_in: str
) -> None:
    base = ["--model", str(tiny_model), "--quantize-bits", "4", "--quantize-group-size", "32"]
    keys = ["--data", str(data_file), "--input-text-key", "question", "--output-text-key", "reply"]
    named = ["--adapter", str(run / "adapters"), "--to", "fused", "--out", str(tmp_path / "out"), "--gate-rows", "4"]
    assert main(["export", *named, *base, *keys, "--quantized", how]) == 0
    found = json.loads((tmp_path / "out" / "export.json").read_text())
    assert found["gate"]["scores"][0]["kl_mean"] < 1e-3 and found["survival"]["least"] > 0.8
    assert f"It loads in {loads_in}." in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter_apart_from_its_run_needs_data_and_its_card_says_what_is_not_known(
    run: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = shutil.copytree(run / "adapters", tmp_path / "apart" / "adapters")
    command = ["export", "--adapter", str(adapter), "--to", "peft", "--out", str(tmp_path / "out"), "--gate-rows", "2"]
    assert main(command) == 2
    assert "The gate needs hold-out rows." in capsys.readouterr().err
    keys = ["--data", str(data_file), "--input-text-key", "question", "--output-text-key", "reply"]
    assert main([*command, *keys]) == 0
    assert "Not known here: the adapter does not lie in a finished run." in (tmp_path / "out" / "README.md").read_text()
    assert main([*command, "--run", str(run)]) == 0


def test_without_a_token_it_is_told_what_would_be_pushed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("finetune_dataflow.exports.hub.token", lambda: None)
    exported(run, tmp_path / "out", "--to", "hub", "--hub-id", "someone/support", "--gate-rows", "2")
    said = capsys.readouterr().out
    assert "Not pushed: no token" in said and "To someone/support would go:" in said
    for each in (tmp_path / "out").iterdir():
        assert f"  {each.name}  {each.stat().st_size:,} bytes" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "--to is missing. Expected one of fused, peft, gguf, gguf-lora, ollama, hub."),
        (("--to", "gguff"), "to='gguff'"),
        (("--to", "hub", "--hub-id", "nobody"), "--hub-id='nobody'"),
        (("--to", "peft", "--hub-id", "a/b"), "are for --to hub, found --to peft"),
        (("--to", "hub", "--hub-kind", "peft", "--hub-id", "a/b"), "which nobody else has. Name its repository: --base-name"),
        (("--to", "fused", "--gate-rows", "0", "--max-kl", "-1"), "max_kl=-1.0"),
        (("--to", "fused", "--min-top", "0.5"), "Unknown option '--min-top'. Did you mean 'min_top1'?"),
        (("--to", "fused", "--license", "no such/licence!"), "expected an identifier such as apache-2.0"),
        (("--to", "ollama", "--ollama-name", "no name!"), "is no name of a model in Ollama"),
        (("--to", "fused", "--check-with", "/no/such/python"), "check_with='/no/such/python' cannot be run"),
        (("--to", "fused", "word"), "'word' was not expected. The adapter is given with --adapter"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], said: str
) -> None:
    assert main(["export", "--adapter", str(run / "adapters"), "--out", str(tmp_path / "out"), *options]) == 2
    assert said in capsys.readouterr().err
    assert names(tmp_path) == set()


def test_a_directory_with_other_things_is_left_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["export", "--adapter", str(run / "adapters"), "--to", "peft", "--out", str(tmp_path)]) == 2
    assert "is not empty and holds no export" in capsys.readouterr().err
    assert names(tmp_path) == {"mine.txt"}


def test_what_an_export_is_made_of_or_what_lies_beside_an_earlier_one_is_not_replaced(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys, out = ["--run", str(run), "--to", "peft", "--gate-rows", "2"], tmp_path / "out"
    exported(run, out, "--to", "peft", "--gate-rows", "2")
    assert main(["export", *keys, "--adapter", str(out), "--out", str(out)]) == 2
    assert "of which the export is made" in capsys.readouterr().err and (out / "adapter_model.safetensors").is_file()
    (out / "notes.txt").write_text("mine")
    assert main(["export", *keys, "--adapter", str(run / "adapters"), "--out", str(out)]) == 2
    assert "holds no export alone: notes.txt" in capsys.readouterr().err and (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    (out / "export.json").write_text('{"messages": []}')
    assert main(["export", *keys, "--adapter", str(run / "adapters"), "--out", str(out)]) == 2
    assert "holds no export alone" in capsys.readouterr().err and (out / "adapter_config.json").is_file()


@pytest.mark.parametrize("name", ["scratch", "earlier", "made"])
def test_an_export_may_have_any_name_and_holds_nothing_of_the_gates(run: Path, tmp_path: Path, name: str) -> None:
    for _ in range(2):
        exported(run, tmp_path / name, "--to", "gguf", "--gate-rows", "2")
        assert names(tmp_path / name) == {f"{name}-f16.gguf", "README.md", "export.json"} and names(tmp_path) == {name}


def test_an_earlier_export_comes_back_where_the_new_one_cannot_take_its_place(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(self: Path, target: Path) -> Path:
        if self.parent.name == "made":
            raise OSError(28, "No space left on device")
        return renamed(self, target)

    out, renamed = tmp_path / "out", Path.rename
    exported(run, out, "--to", "peft", "--gate-rows", "2")
    before = {each.name: each.read_bytes() for each in out.iterdir()}
    monkeypatch.setattr(Path, "rename", failing)
    command = ["export", "--adapter", str(run / "adapters"), "--to", "gguf", "--out", str(out), "--gate-rows", "2"]
    assert main(command) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {each.name: each.read_bytes() for each in out.iterdir()} == before and names(tmp_path) == {"out"}


def test_a_model_that_would_run_on_after_a_reply_ends_it_where_training_did(
    run: Path, data_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "eos_token_id": 261}))  # as a base model that ends texts, not turns
    keys = ["--data", str(data_file), "--input-text-key", "question", "--output-text-key", "reply", "--model", str(base)]
    named = ["--adapter", str(run / "adapters"), "--to", "fused", "--out", str(tmp_path / "out"), "--gate-rows", "2"]
    assert main(["export", *named, *keys]) == 0
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert set(ends) == {261, load_encoder(base).end_of_turn_ids[-1]}


def test_replies_in_another_script_are_scored_by_chrf() -> None:
    class Reader:
        name = "a tool"

        def __init__(self, reply: str) -> None:
            self.reply = reply

        def log_probabilities(self, rows: Any) -> None:
            return None

        def replies(self, rows: Any, encoder: Any, settings: Any) -> list[str]:
            return [self.reply for _ in rows]

    reference = "Верните товар за четырнадцать дней."
    row = GateRow(0, (1, 2), (1,), (1,), reference, Conversation(0, ({"role": "user", "content": "?"},), reference), True)
    against = Reference(Reader(reference), [row], None, GenerationSettings(8, 1))  # type: ignore[arg-type]
    found = against.scores(Reader("Ничего похожего"))
    assert (found.metric, found.score_adapter) == ("chrf", 1.0)
    assert found.score_export is not None and found.score_export < 0.3
    assert "chrF is" in found.failures(GateSettings(1, 0.02, 0.95, 0.05, "", False))[0]


@pytest.mark.parametrize(
    ("rope", "read_by"), [({}, {"llama.cpp", "transformers"}), ({"rope_type": "linear", "factor": 4.0}, {"llama.cpp"})]
)
def test_a_scaled_rotary_embedding_is_not_judged_by_a_reader_that_drops_it(
    tmp_path: Path, rope: dict[str, Any], read_by: set[str], monkeypatch: pytest.MonkeyPatch, data_file: Path
) -> None:
    from finetune_dataflow.exports import flow
    from tests.drawn_adapters import adapter_of

    asked: list[set[str]] = []

    def recorded(python: str, wanted: Any, directory: Path) -> Any:
        asked.append({tool for tool, _ in wanted})
        return [], []

    base = write_model(tmp_path / "base", "llama", **({"rope_scaling": rope} if rope else {}))
    adapter = adapter_of(base, tmp_path / "adapter")
    monkeypatch.setattr(flow.readers, "outside_readers", recorded)
    keys = ["--data", str(data_file), "--input-text-key", "question", "--output-text-key", "reply", "--model", str(base)]
    named = ["--adapter", str(adapter), "--to", "gguf", "--out", str(tmp_path / "out"), "--gate-rows", "2", "--max-tokens", "4"]
    assert main(["export", *named, *keys]) == 0
    assert asked == [read_by]


def test_a_tool_that_cannot_read_the_export_counts_as_a_gate_that_is_not_reached(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune_dataflow.exports import readers

    monkeypatch.setattr(readers, "installed", lambda python: {"torch": "2", "transformers": "5"})
    command = ["export", "--adapter", str(run / "adapters"), "--to", "fused", "--out", str(tmp_path / "out"), "--gate-rows", "2"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "transformers 5 cannot read the export:" in said and "No module named 'torch'" in said
    assert main([*command, "--force"]) == 0 and (tmp_path / "out" / "model.safetensors").is_file()


def test_an_architecture_without_names_in_gguf_is_refused_before_the_model_is_fused(
    data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.drawn_adapters import adapter_of

    base = write_architecture(tmp_path / "base", "stablelm", layers=2)
    adapter = adapter_of(base, tmp_path / "adapter")
    monkeypatch.setattr(building, "fuse", lambda *_, **__: pytest.fail("fused"))
    keys = ["--data", str(data_file), "--input-text-key", "question", "--output-text-key", "reply", "--model", str(base)]
    assert main(["export", "--adapter", str(adapter), "--to", "gguf", "--out", str(tmp_path / "out"), *keys]) == 2
    assert "of the architecture 'stablelm', for which no GGUF is written here" in capsys.readouterr().err


def test_a_chat_template_that_go_cannot_express_is_refused_with_the_construct(
    run: Path, data_file: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "shouting.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    out = tmp_path / "out"
    command = ["export", "--adapter", str(run / "adapters"), "--to", "ollama", "--out", str(out)]
    assert main([*command, "--prompt-format", str(template)]) == 2
    assert "upper" in capsys.readouterr().err and not out.exists()
