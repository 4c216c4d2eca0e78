"""A model directory's tokenizer as GGUF's metadata describe one, for llama.cpp and other readers.

GGUF holds tokens, their types, merges or scores, and the name of a splitting rule that the reader has built in. llama.cpp's
own converter finds that name by a hash of one text's ids; here the tokenizer's definition is compared with those of the
rules, and one that is none of them is refused: a file that names another rule would load and read texts wrongly.
SentencePiece tokenizers have no rule but scores, which are made from the merges and then proven on a text.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_dataflow.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp, enum llama_token_type

# How the families of byte-level tokenizers split a text before merging; each string stands so in their tokenizer.json.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
LLAMA3 = rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
QWEN2 = rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
TEKKEN = (
    rf"{_LEAD}{_CAPITALS}*{_SMALL}+|{_LEAD}{_CAPITALS}+{_SMALL}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
)  # fmt: skip
GPT_4O = (
    rf"{_LEAD}{_CAPITALS}*{_SMALL}+{_CONTRACTIONS}?|{_LEAD}{_CAPITALS}+{_SMALL}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
)

# What the rule is made of, and whether whole words are looked up before merging: GGUF's name of the rule.
_RULES: dict[tuple[tuple[tuple[object, ...], ...], bool], str] = {
    ((("ByteLevel", True),), False): "gpt-2",
    ((("Digits", True), ("ByteLevel", True)), False): "smollm",
    ((("Split", LLAMA3), ("ByteLevel", False)), True): "llama-bpe",
    ((("Split", LLAMA3), ("ByteLevel", False)), False): "smaug-bpe",
    ((("Split", QWEN2), ("ByteLevel", False)), False): "qwen2",
    ((("Split", TEKKEN), ("ByteLevel", False)), True): "tekken",
    ((("Split", GPT_4O), ("ByteLevel", False)), False): "gpt-4o",
}

_SPACE = "▁"
_LAST_SCORE = -1e9  # of what no merge makes, so that it is joined after everything else
_PROBE = (
    'The quick brown fox, aged 12, can\'t pay 1,234.50 euros: "why?" he asked.\n\n  Two  spaces,\ta tab; ünïcödé, '
    "日本語のテキスト, привет мир, 🙂 and <tags/> in def f(x): return x**2 # code\nLast line  "
)


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer in GGUF's terms.

    model: "gpt2" for byte-level BPE, which has merges; "llama" for SentencePiece, which has scores. pre: the splitting rule.
    tokens, types, scores: one for every row of the embedding. special_ids: of bos, eos, eot, unk and pad those that there are.
    add_space_prefix: None where the model "gpt2" leaves no choice. chat_template: None for none, a dict of several by name.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special_ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool | None
    chat_template: str | dict[str, str] | None


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer as training reads it. Raises UserError where it cannot be read, or is not a fast one."""
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns that PyTorch is missing, which is meant
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"The tokenizer in {directory} cannot be read: {error}") from error
    if not tokenizer.is_fast:
        raise UserError(f"The tokenizer in {directory} has no tokenizer.json. Expected one that the package tokenizers reads.")
    return tokenizer


def gguf_tokenizer(directory: Path, rows: int) -> GgufTokenizer:
    """The tokenizer of a model directory in GGUF's terms, filled up with unused tokens to `rows`, the embedding's rows.

    Raises UserError for a tokenizer that GGUF cannot describe, or that llama.cpp would read otherwise, with the reason.
    """
    tokenizer = load_tokenizer(directory)
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    described = f"The tokenizer in {directory}"
    _check_model(definition, described)
    if definition["model"].get("byte_fallback"):
        parts = _sentencepiece(tokenizer, definition, rows, described)
    else:
        parts = _byte_level(tokenizer, definition, rows, described)
    _, last = _added(tokenizer)
    return GgufTokenizer(
        **parts,
        special_ids=_special_ids(directory, tokenizer, described),
        add_bos=adds_bos(directory),
        add_eos=last is not None and last == tokenizer.eos_token_id,
        chat_template=tokenizer.chat_template,
    )


def adds_bos(directory: Path) -> bool:
    """Whether a reader is to put the beginning of sequence before a text: where the tokenizer adds it, and training had it.

    Readers put it before what the chat template writes, once; before a template that does without in training, never.
    """
    from finetune_dataflow.engine.chat import load_encoder

    tokenizer = load_tokenizer(directory)
    first, _ = _added(tokenizer)
    if first is None or first != tokenizer.bos_token_id:
        return False
    return not tokenizer.chat_template or load_encoder(directory).prompt_ids([{"role": "user", "content": "Hello"}])[:1] == [
        first
    ]


def add_tokenizer(writer: GGUFWriter, tokenizer: GgufTokenizer) -> None:
    """Put a tokenizer into the metadata of a GGUF file that is being written."""
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    if tokenizer.scores is not None:
        writer.add_token_scores(tokenizer.scores)
    if tokenizer.merges is not None:
        writer.add_token_merges(tokenizer.merges)
    adding = {
        "bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "eot": writer.add_eot_token_id,
        "unk": writer.add_unk_token_id, "pad": writer.add_pad_token_id,
    }  # fmt: skip
    for name, number in tokenizer.special_ids.items():
        adding[name](number)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(tokenizer.add_eos)
    if tokenizer.add_space_prefix is not None:
        writer.add_add_space_prefix(tokenizer.add_space_prefix)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template:
        writer.add_chat_template(template)


def sentencepiece_ids(text: str, ids: dict[str, int], scores: dict[str, float], add_space_prefix: bool) -> list[int]:
    """The ids of a text as llama.cpp finds them: of all neighbours that make a token, those with the highest score are joined.

    What is left and no token is written in bytes.
    """
    pieces = [*((_SPACE if add_space_prefix and text else "") + text.replace(" ", _SPACE))]
    while True:
        joined = [(scores.get(left + right), place) for place, (left, right) in enumerate(pairwise(pieces))]
        best = max(((score, -place) for score, place in joined if score is not None), default=None)
        if best is None:
            break
        place = -best[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    found: list[int] = []
    for piece in pieces:
        found += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return found


def _check_model(definition: dict[str, Any], described: str) -> None:
    model = definition["model"]
    odd = [name for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(name)]
    if model["type"] != "BPE" or odd:
        found = f"{model['type']} with {', '.join(odd)}" if odd else str(model["type"])
        raise UserError(
            f"{described} is a {found} tokenizer, for which no GGUF is written here. Expected byte-level BPE or SentencePiece."
        )
    if not model["merges"]:
        raise UserError(f"{described} has no merges, which llama.cpp needs.")


def _byte_level(tokenizer: PreTrainedTokenizerBase, definition: dict[str, Any], rows: int, described: str) -> dict[str, Any]:
    parts = tuple(_splitting(part) for part in _flat(definition["pre_tokenizer"], "pretokenizers"))
    rule = _RULES.get((parts, bool(definition["model"].get("ignore_merges"))))
    normalizers = [part["type"] for part in _flat(definition["normalizer"], "normalizers")]
    if rule is None or normalizers not in ([], ["NFC"]):
        what = f"normalises texts by {', '.join(normalizers)}" if rule else "splits texts by a rule that no known family has"
        raise UserError(
            f"{described} {what}: {json.dumps(definition['normalizer' if rule else 'pre_tokenizer'], ensure_ascii=False)[:300]}. "
            f"llama.cpp knows such rules by name only; known here: {', '.join(sorted(_RULES.values()))}."
        )
    tokens, types = _tokens(tokenizer, definition, rows, described, {})
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in definition["model"]["merges"]]
    return {
        "model": "gpt2", "pre": rule, "tokens": tokens, "types": types, "scores": None, "merges": merges,
        "add_space_prefix": None,
    }  # fmt: skip


def _sentencepiece(tokenizer: PreTrainedTokenizerBase, definition: dict[str, Any], rows: int, described: str) -> dict[str, Any]:
    prefix = _space_prefix(definition, described)
    ids: dict[str, int] = definition["model"]["vocab"]
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in ids]
    if missing:
        raise UserError(f"{described} lacks {len(missing)} of the 256 byte tokens, such as {missing[0]}, which llama.cpp needs.")
    made: dict[str, float] = {}
    for rank, pair in enumerate(definition["model"]["merges"]):
        left, right = pair if isinstance(pair, list) else pair.split(" ")
        made.setdefault(left + right, -float(rank))
    scores = {piece: made.get(piece, _LAST_SCORE) for piece in ids}
    theirs = tokenizer.backend_tokenizer.encode(_PROBE, add_special_tokens=False).ids
    if sentencepiece_ids(_PROBE, ids, scores, prefix) != theirs:
        raise UserError(
            f"{described} is like SentencePiece's but joins pieces in an order that no scores give; GGUF cannot say so."
        )
    kinds = {piece: BYTE for piece in ids if len(piece) == 6 and piece.startswith("<0x")}
    unknown = definition["model"].get("unk_token")
    tokens, types = _tokens(tokenizer, definition, rows, described, kinds | ({unknown: UNKNOWN} if unknown else {}))
    return {
        "model": "llama", "pre": "default", "tokens": tokens, "types": types, "merges": None, "add_space_prefix": prefix,
        "scores": [scores.get(token, _LAST_SCORE) for token in tokens],
    }  # fmt: skip


def _tokens(
    tokenizer: PreTrainedTokenizerBase, definition: dict[str, Any], rows: int, described: str, kinds: dict[str, int]
) -> tuple[list[str], list[int]]:
    """Every row's token and type; `kinds`: the types of some tokens of the vocabulary."""
    byte_level = not definition["model"].get("byte_fallback")
    entries = {number: (text, kinds.get(text, NORMAL)) for text, number in definition["model"]["vocab"].items()}
    for added in definition["added_tokens"]:
        text, number = added["content"], added["id"]
        if entries.get(number, ("", NORMAL))[1] == UNKNOWN:
            continue
        if added["special"] or _looks_like_control(text):
            entries[number] = (text, CONTROL)
        else:
            entries[number] = (text if byte_level else text.replace(_SPACE, " "), USER_DEFINED)
    if max(entries) >= rows:
        raise UserError(f"{described} has the token id {max(entries)}, but the model's embedding has {rows} rows.")
    every = [entries.get(number, (f"[PAD{number}]", UNUSED)) for number in range(rows)]
    texts = [text for text, _ in every]
    if len({*texts}) != len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise UserError(f"{described} has two ids for {twice!r}, which llama.cpp does not load.")
    return texts, [kind for _, kind in every]


def _looks_like_control(text: str) -> bool:
    """Whether llama.cpp takes an added token for control by its text alone, as its converter does."""
    return (
        (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<unused") and text.endswith(">"))
        or text in {"<pad>", "<mask>", "<2mass>", "[@BOS@]"}
    )


def _flat(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normaliser or pre-tokeniser, sequences in sequences resolved."""
    if part is None:
        return []
    return [step for inner in part[key] for step in _flat(inner, key)] if part["type"] == "Sequence" else [part]


def _splitting(part: dict[str, Any]) -> tuple[object, ...]:
    """What a step of a pre-tokeniser does, in a form that can be compared; an empty tuple for what no rule has."""
    if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
        return "ByteLevel", part.get("use_regex", True)
    if part["type"] == "Digits":
        return "Digits", part["individual_digits"]
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"] and "Regex" in part["pattern"]:
        return "Split", part["pattern"]["Regex"]
    return ()


def _space_prefix(definition: dict[str, Any], described: str) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text; UserError for steps that it does not have."""
    prefix = replaces = False
    steps = [*_flat(definition["normalizer"], "normalizers"), *_flat(definition["pre_tokenizer"], "pretokenizers")]
    for step in steps:
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefix = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _SPACE:
            replaces = True
        elif step["type"] == "Metaspace" and step["replacement"] == _SPACE and not step.get("split", True):
            prefix, replaces = prefix or step["prepend_scheme"] != "never", True
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "} and replaces):  # no space is left to split at
            raise UserError(f"{described} is like SentencePiece's but prepares texts by {step}, which GGUF cannot say.")
    if not replaces:
        raise UserError(f"{described} has byte tokens but does not write spaces as {_SPACE!r}; no GGUF is written for that.")
    return prefix


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int | None]:
    """The ids that the tokenizer puts before and after a text; None for none."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a", add_special_tokens=True)
    start = next(place for place in range(len(whole)) if whole[place : place + len(plain)] == plain)
    after = whole[start + len(plain) :]
    return (whole[0] if start else None), (after[-1] if after else None)


def _special_ids(directory: Path, tokenizer: PreTrainedTokenizerBase, described: str) -> dict[str, int]:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    in_config = {name: config.get(f"{name}_token_id") for name in ("bos", "eos")}
    in_config = {name: value[0] if isinstance(value, list) else value for name, value in in_config.items()}
    found = {
        "bos": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else in_config["bos"],
        "eos": tokenizer.eos_token_id if tokenizer.eos_token_id is not None else in_config["eos"],
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    if found["eos"] is None:
        raise UserError(f"{described} names no end of sequence, without which no reply would end.")
    found["eot"] = _end_of_turn(directory, tokenizer)  # without it llama.cpp looks for a token that has a likely name
    return {name: int(number) for name, number in found.items() if number is not None}


def _end_of_turn(directory: Path, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends a turn by the chat template, which is what training teaches; None without a template."""
    from finetune_dataflow.engine.chat import load_encoder

    return load_encoder(directory).end_of_turn_ids[-1] if tokenizer.chat_template else None
