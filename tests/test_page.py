from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import zlib
from html.parser import HTMLParser
from typing import Any

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs

from finetune_dataflow.engine.page import (
    Block,
    Cell,
    Chart,
    Code,
    Drawing,
    Facts,
    Page,
    Prose,
    Row,
    RowTable,
    Section,
    Table,
    html,
    word_marks,
)

HOSTILE = (
    "<script>window.__hacked = 'script'</script>",
    '"><img src=x onerror="window.__hacked = 1">',
    "' onmouseover='window.__hacked = 2' autofocus onfocus='window.__hacked = 3",
    "</script><script>window.__hacked = 4</script><!--",
    "</title></style></textarea></template><svg onload=alert(5)>",
    "<a href='javascript:window.__hacked = 6'>click</a> <a href=https://evil.example/>out</a>",
    "javascript:alert(7)",
    "]]><![CDATA[&lt;b&gt;{{7*7}}${7*7}",
    "\x1b[31mred\x1b[0m\x00\x07\x9b",
    "\u202egnp.exe\u2066 \u200e\u200b\ufeff",
    "half \ud800 of a pair \udfff",
    "line\u2028separator\u2029paragraph\x85next",
    "שלום עולם, זה טקסט עברי with English words",
    "word" * 2000,
    "many words, " * 800,
    "two\n\nlines\r\n\tand a tab",
    "Z" + "\u0351" * 200,
    "",
)
EVIL = "".join(HOSTILE[:12])
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="900pt" height="120pt" viewBox="0 0 900 120">' + "".join(
    f'<g class="node"><rect x="{10 + 150 * place}" y="35" width="130" height="44" rx="8" fill="#e8eef7" stroke="#44618c"/>'
    f'<text x="{75 + 150 * place}" y="62" text-anchor="middle" font-family="Helvetica" font-size="14">{name}</text></g>'
    for place, name in enumerate(("rows", "split", "tokens", "fit", "scores", "report"))
) + "</svg>"  # fmt: skip


def page_of(*blocks: Block, **fields: Any) -> str:
    return html(Page(title="Run", headline="It helped.", sections=(Section("Part", blocks),), **fields))


def hostile_page() -> Page:
    """A page with hostile text in every field that takes text, charts included."""
    rows = [
        Row(number, text, HOSTILE[(number + 1) % len(HOSTILE)], text[::-1], HOSTILE[(number + 2) % len(HOSTILE)], 0.25, 0.5)
        for number, text in enumerate(HOSTILE)
    ]
    figure = go.Figure(go.Bar(x=[EVIL, "b"], y=[1, 2], name=EVIL, text=[EVIL, EVIL], hovertext=[EVIL, EVIL]))
    figure.update_layout(title=EVIL, xaxis_title=EVIL, showlegend=True)
    blocks: tuple[Block, ...] = (
        Chart(figure, EVIL, EVIL),
        Table((EVIL, "text"), [(str(place), text) for place, text in enumerate(HOSTILE)], EVIL, searchable=True),
        Table((EVIL, EVIL), [(Cell(EVIL, 1.0, "better"), EVIL)], EVIL, kinds=("diff", "code")),
        Facts(((EVIL, EVIL),)),
        Prose("\n\n".join(HOSTILE)),
        Code("\n".join(HOSTILE), EVIL),
        Drawing(SVG, EVIL, EVIL),
        RowTable(rows, EVIL, base=EVIL, tuned=EVIL, score=EVIL),
    )
    sections = (Section(EVIL, blocks, EVIL), Section(EVIL, blocks[:2], EVIL, collapsed=True))
    return Page(EVIL, EVIL, "unclear", (EVIL, HOSTILE[13]), ((EVIL, EVIL), (HOSTILE[13], HOSTILE[13])), sections, EVIL)


def realistic_rows(count: int) -> list[Row]:
    """Rows such as a customer-support data set has: questions of some 40 words, replies of some 50."""
    words = re.findall(
        r"\w+",
        "the account order please invoice when after customer refund delivery could address change number reply team "
        "because subscription email should payment your before contact thank we you is it not days card shipped status",
    )
    draw = random.Random(5)

    def sentence(length: int) -> str:
        return " ".join(draw.choices(words, k=length)).capitalize() + "."

    rows = []
    for number in range(count):
        reference = " ".join(sentence(12) for _ in range(4))
        kept = [word if draw.random() < 0.85 else draw.choice(words) for word in reference.split()]
        base, tuned = draw.random() / 2, draw.random()
        rows.append(
            Row(number * 7 + 3, sentence(40), reference, sentence(50), " ".join(kept), base, base if number % 9 == 0 else tuned)
        )
    return rows


def pleasant_page(count: int = 1000) -> Page:
    """A page as a good run has it, with `count` rows of the hold-out."""
    steps = list(range(0, 400, 10))
    loss = go.Figure(
        [
            go.Scatter(x=steps, y=[2.6 / (1 + step / 90) + 0.7 for step in steps], name="training", mode="lines"),
            go.Scatter(
                x=steps[::4], y=[2.5 / (1 + step / 110) + 0.85 for step in steps[::4]], name="validation", mode="lines+markers"
            ),
        ]
    )
    loss.update_layout(xaxis_title="step", yaxis_title="loss (nats per token)", margin={"t": 30, "r": 20})
    bars = go.Figure(go.Histogram(x=[row.tuned_score - (row.base_score or 0) for row in realistic_rows(300) if row.tuned_score]))
    bars.update_layout(xaxis_title="ROUGE-L, tuned less base", yaxis_title="rows", margin={"t": 30, "r": 20})
    metrics = Table(
        ("Metric", "Base", "Tuned", "Difference", "95 % interval"),
        [
            ("ROUGE-1", 0.2931, 0.4874, Cell("+0.194", 0.1943, "better"), "0.171 to 0.218"),
            ("ROUGE-L", 0.2412, 0.4306, Cell("+0.189", 0.1894, "better"), "0.166 to 0.213"),
            ("Loss", 2.913, 1.207, Cell("-1.706", -1.706, "better"), "-1.79 to -1.62"),
            ("Reply length", 48.2, 51.9, Cell("+3.7", 3.7), "-1.0 to 8.2"),
        ],
        "Means over the hold-out.",
    )
    ledger = Table(
        ("Row", "Reason", "Length", "Text"),
        [(number, "too long" if number % 3 else "empty", 900 + 13 * number, f"Row {number} said this") for number in range(150)],
        "Rows that were not used.", searchable=True, kinds=("number", "text", "number", "code"),
    )  # fmt: skip
    sections = (
        Section("How good the replies are", (metrics, Chart(bars, "How each row's score changed.", "A histogram around 0.2."))),
        Section("How the training went", (Chart(loss, "Loss of both sets of rows.", "Both losses fall to about 1.2."),),
                "Four hundred steps over three epochs; the checkpoint of step 360 was kept."),
        Section("Every row of the hold-out", (RowTable(realistic_rows(count), f"{count:,} rows.", score="ROUGE-L"),),
                "The model saw none of these rows. Scores are ROUGE-L against the reference."),
        Section("How it was computed", (Drawing(SVG, "The dataflow.", "Six steps from rows to report."),), collapsed=True),
        Section("Rows left out", (ledger,)),
        Section("Do it again", (Prose("The command below repeats this run.\n\nIts settings are in config.yaml."),
                                Code("python run.py train \\\n  --model smollm2 \\\n  --data support.json", "The command"),
                                Facts((("Seed", "7"), ("Device", "CPU, 2 threads"))))),
    )  # fmt: skip
    facts = (
        ("ROUGE-L, base → tuned", "0.241 → 0.431"), ("Loss, base → tuned", "2.913 → 1.207"), ("Hold-out rows", f"{count:,}"),
        ("Training rows", "8,000"), ("Trained tokens", "1,204,331"), ("Time", "12 min 40 s"), ("Peak memory", "3.1 GiB"),
        ("Model", "smollm2-135m-instruct"),
    )  # fmt: skip
    return Page(
        "Support replies · run support-3fa91c02",
        "The tuned model is better than the base model: its replies share 19 points more with the references "
        "(95 % interval 17 to 21).",
        "better",
        ("12 rows had their prompt shortened to 512 tokens.", "The hold-out has 3 near-duplicates of training rows."),
        facts, sections, "Made by finetune-dataflow 0.1.0 on 23 November 2026.",
    )  # fmt: skip


class Reader(HTMLParser):
    """What a parser finds in a page: elements with attributes, and the text of each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, *tags: str) -> str:
        """All text, or that directly in elements of some tags."""
        return "".join(text for tag, text in self.texts if tag in tags or (not tags and tag not in ("script", "style")))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for each, attributes in self.elements if each == tag]


@pytest.fixture(scope="module")
def hostile() -> str:
    return html(hostile_page())


@pytest.fixture(scope="module")
def pleasant() -> str:
    return html(pleasant_page())


def body(text: str) -> str:
    """The page's content, without style, scripts and what the scripts are given."""
    return re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)


def test_hostile_text_makes_no_element_and_no_attribute(hostile: str) -> None:
    reader = Reader(hostile)
    harmless = Reader(html(pleasant_page(3)))
    assert {tag for tag, _ in reader.elements} <= {tag for tag, _ in harmless.elements} | {"ins", "del", "button"}
    names = {name for _, attributes in reader.elements for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "srcdoc", "action", "autofocus")]
    assert {each.get("href") for each in reader.all("a") + reader.all("link")} == {
        "#content",
        "data:,",
        "#section-1",
        "#section-2",
    }
    assert reader.open == [] and len(reader.all("script")) == 5  # two figures, the themes, the library packed, the page's own


def test_hostile_text_can_be_read_as_it_is_written(hostile: str) -> None:
    text = Reader(hostile).text()
    for each in HOSTILE[:8]:
        assert each in text
    for escape in (r"\x1b[31mred\x1b[0m\x00\x07\x9b", r"\u202egnp.exe\u2066 \u200e\u200b\ufeff", r"half \ud800 of a pair \udfff",
                   r"line\u2028separator\u2029paragraph\x85next", "\n\nlines\\r\n\tand"):  # fmt: skip
        assert escape in text
    assert "שלום עולם, זה טקסט עברי with English words" in text and "word" * 2000 in text


def test_no_control_nor_half_of_a_pair_is_left_in_the_file(hostile: str) -> None:
    hostile.encode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]", hostile)


BLOCKS: tuple[Block, ...] = (
    Chart({"data": [{"name": EVIL}], "layout": {}}, "", ""),
    Chart({"data": [], "layout": {}}, EVIL, ""),
    Chart({"data": [], "layout": {}}, "", EVIL),
    Table((EVIL,), ()),
    Table(("",), ((EVIL,),)),
    Table(("",), (), EVIL),
    Table(("",), ((Cell(EVIL, 2.0),),), kinds=("number",)),
    Table(("",), ((EVIL,),), kinds=("code",)),
    Facts(((EVIL, EVIL),)),
    Prose(EVIL),
    Code(EVIL),
    Code("", EVIL),
    Drawing("<svg></svg>", EVIL, ""),
    Drawing("<svg></svg>", "", EVIL),
    RowTable((Row(1, EVIL, "", "", "", None, None),)),
    RowTable((Row(1, "", EVIL, EVIL, "", None, None),)),
    RowTable((Row(1, "", "", EVIL, "", None, None),)),
    RowTable((Row(1, "", f"a b c d {EVIL}", "", "a b c d", None, None),)),
    RowTable((), EVIL),
    RowTable((Row(1, "", "", "", "", 0.0, 1.0),), "", EVIL, EVIL, EVIL),
)
FIELDS: list[tuple[str, Page]] = [
    ("title", Page(EVIL, "")),
    ("headline", Page("", EVIL)),
    ("note", Page("", "", notes=(EVIL,))),
    ("fact label", Page("", "", facts=((EVIL, ""),))),
    ("fact value", Page("", "", facts=(("", EVIL),))),
    ("footer", Page("", "", footer=EVIL)),
    ("section", Page("", "", sections=(Section(EVIL, ()),))),
    ("intro", Page("", "", sections=(Section("", (), EVIL, collapsed=True),))),
    *((f"{type(block).__name__} {place}", Page("", "", sections=(Section("", (block,)),))) for place, block in enumerate(BLOCKS)),
]


@pytest.mark.parametrize("page", [page for _, page in FIELDS], ids=[name for name, _ in FIELDS])
def test_every_field_shows_its_text_and_makes_no_element_of_it(page: Page) -> None:
    reader = Reader(html(page))
    shown = reader.text() + "".join(str(value) for _, attributes in reader.elements for value in attributes.values())
    figures = "".join(text for tag, text in reader.texts if tag == "script")
    assert "window.__hacked = 'script'" in re.sub("</?(ins|del)>", "", shown) or "window.__hacked = 'script'" in figures
    assert "img" not in {tag for tag, _ in reader.elements}
    assert all((each.get("href") or "").startswith("#") for each in reader.all("a"))
    assert all(set(each) <= {"type", "id"} for each in reader.all("script"))


def test_what_the_scripts_are_given_cannot_end_its_element(hostile: str) -> None:
    given_json = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', hostile, re.DOTALL)
    assert len(given_json) == 3
    for each in given_json:
        assert not re.search("[<>&]", each) and each.isascii()
    figure = json.loads(given_json[0])
    assert figure["data"][0]["name"].startswith("<script>window.__hacked")
    assert r"\u202egnp.exe" in figure["data"][0]["name"]


def test_plotly_is_given_no_link_to_draw() -> None:
    text = page_of(Chart({"data": [{"name": "<b>x</b><a href='https://evil.example'>y</a>< A href=z>"}], "layout": {}}, "", ""))
    figure = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', text)[0])
    assert figure["data"][0]["name"] == "<b>x</b>&lt;a href='https://evil.example'>y&lt;/a>&lt; A href=z>"


def test_the_policy_lets_the_pages_two_scripts_run_and_nothing_be_fetched(pleasant: str) -> None:
    reader = Reader(pleasant)
    policy = next(each["content"] for each in reader.all("meta") if each.get("http-equiv") == "Content-Security-Policy")
    own = re.findall(r"<script>(.*?)</script>", pleasant, re.DOTALL)[-1]
    packed = re.findall(r'<script type="text/plain" id="plotly">(.*?)</script>', pleasant)[0]
    library = zlib.decompress(base64.b64decode(packed))
    assert library.decode() == get_plotlyjs()
    hashes = [base64.b64encode(hashlib.sha256(each).digest()).decode() for each in (own.encode(), library)]
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}'; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def test_the_same_page_gives_the_same_bytes() -> None:
    assert html(pleasant_page(20)) == html(pleasant_page(20))
    one = Chart({"layout": {"height": 300, "title": "t"}, "data": [{"y": [1], "type": "bar"}]}, "", "")
    other = Chart({"data": [{"type": "bar", "y": [1]}], "layout": {"title": "t", "height": 300}}, "", "")
    assert page_of(one) == page_of(other)


def test_a_thousand_rows_of_support_replies_take_less_than_six_megabytes(pleasant: str) -> None:
    texts = sum(len(text) for row in realistic_rows(1000) for text in row[1:5])
    assert texts > 1_000_000
    assert len(pleasant.encode()) < 4_500_000


def test_a_page_without_charts_carries_no_library() -> None:
    text = page_of(Prose("No chart."))
    assert "text/plain" not in text and len(text) < 60_000


def test_without_scripts_verdict_facts_and_tables_are_there(pleasant: str) -> None:
    reader = Reader(body(pleasant))
    assert "The tuned model is better than the base model" in reader.text("h1")
    assert "Better" in reader.text("p") and "0.241 → 0.431" in reader.text("dd")
    assert len(reader.all("tr")) == 5 + 1001 + 151
    assert reader.text("h2").count("Every row of the hold-out") == 1
    assert "A histogram around 0.2." in reader.text("p")


@pytest.mark.parametrize(("tone", "word"), [("better", "Better"), ("worse", "Worse"), ("unclear", "Unclear")])
def test_a_verdicts_tone_is_a_word_and_a_colour(tone: Any, word: str) -> None:
    text = html(Page("Run", "So it is.", tone))
    assert f'<section class="verdict {tone}"' in text and f"</svg>{word}</p>" in text


def test_a_verdict_without_a_tone_has_no_badge() -> None:
    assert 'class="badge"' not in html(Page("Run", "Nothing was compared."))


def test_the_index_leads_to_every_section_and_no_two_elements_share_an_id(pleasant: str) -> None:
    reader = Reader(pleasant)
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert [each["href"] for each in reader.all("a")] == ["#content", *(f"#section-{number}" for number in range(1, 7))]
    assert {str(each["href"])[1:] for each in reader.all("a")} <= set(ids)


def cells(table: Table) -> list[tuple[str, str | None]]:
    """The text of each cell of a table of one row, and what it is sorted by."""
    text = page_of(table)
    found = re.findall(r"<t[hd]([^>]*)>(.*?)</t[hd]>", re.findall(r"<tbody>(.*?)</tbody>", text, re.DOTALL)[0], re.DOTALL)
    return [
        (re.sub("<[^>]*>", "", inside), (re.findall('data-v="(.*?)"', attributes) or [None])[0]) for attributes, inside in found
    ]


def test_numbers_are_shown_short_and_sorted_whole() -> None:
    values = (1234567, 0.123456, 12345.678, -2.5, 0, None, float("nan"), float("inf"), 3e-7)
    table = Table(tuple("abcdefghi"), [values], kinds=("number",) * 9)
    assert cells(table) == [
        ("1,234,567", "1234567"), ("0.1235", "0.123456"), ("12,346", "12345.678"), ("\u22122.5", "-2.5"), ("0", "0"),
        ("\u2013", ""), ("\u2013", ""), ("\u221e", "Infinity"), ("3e\u221207", "3e-07"),
    ]  # fmt: skip


def test_a_difference_bears_its_sign() -> None:
    table = Table(("a", "b", "c", "d"), [(0.25, -3, 0, Cell("much", 9.5, "worse"))], kinds=("diff",) * 4)
    assert cells(table) == [("+0.25", "0.25"), ("\u22123", "-3"), ("0", "0"), ("much worse", "9.5")]


def test_a_column_is_one_of_numbers_where_all_its_values_are() -> None:
    text = page_of(Table(("mixed", "whole", "gaps", "words"), [(1, 2, None, "x"), ("one", 3.5, 4, None)]))
    heads = re.findall(r"<th scope=\"col\"([^>]*)>(\w+)</th>", text)
    assert [(name, "num" in attributes) for attributes, name in heads] == [
        ("mixed", False), ("whole", True), ("gaps", True), ("words", False),
    ]  # fmt: skip


def test_a_table_that_does_not_fit_its_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1 has 1 cells for 2 columns"):
        Table(("a", "b"), [(1, 2), (3,)])
    with pytest.raises(ValueError, match="1 kinds for 2 columns"):
        Table(("a", "b"), [], kinds=("text",))
    with pytest.raises(ValueError, match="kind is 'date', expected one of text, number, code, diff"):
        Table(("a",), [], kinds=("date",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tone is 'good', expected one of better, worse, unclear, none"):
        Page("", "", "good")  # type: ignore[arg-type]


def row_states(rows: RowTable) -> list[str]:
    return re.findall(r'<tr class="(\w+)">', page_of(rows))


def test_a_row_is_better_worse_or_equal_to_three_digits() -> None:
    pairs: list[tuple[float | None, float | None]] = [(0.1, 0.2), (0.2, 0.1), (0.3, 0.3004), (None, 0.5), (0.5, float("nan"))]
    rows = [Row(number, "", "", "", "", base, tuned) for number, (base, tuned) in enumerate(pairs)]
    assert row_states(RowTable(rows)) == ["better", "worse", "equal", "none", "none"]
    assert row_states(RowTable(rows, higher_is_better=False)) == ["worse", "better", "equal", "none", "none"]
    filters = re.findall(r"<span>(\w+) <b>(\d+)</b></span>", page_of(RowTable(rows)))
    assert filters == [("All", "5"), ("Better", "1"), ("Worse", "1"), ("Equal", "1")]


@pytest.mark.parametrize(
    ("reference", "reply", "marks"),
    [
        ("The cat sat.", "The cat sat.", [("same", "The cat sat.")]),
        ("the big cat sat", "the cat sat", [("same", "the "), ("missing", "big"), ("same", "cat sat")]),
        ("the cat sat", "the big  cat sat", [("same", "the "), ("extra", "big"), ("same", "  cat sat")]),
        ("Yes, it is.", "Yes it is.", [("same", "Yes"), ("missing", ","), ("same", " it is.")]),
        ("one two three", "one 2 three", [("same", "one "), ("missing", "two"), ("extra", "2"), ("same", " three")]),
        ("spaces  do not\ncount", "spaces do not count", [("same", "spaces do not count")]),
        ("我喜欢猫", "我喜欢狗", [("same", "我喜欢"), ("missing", "猫"), ("extra", "狗")]),
        ("Paris", "London", [("extra", "London")]),
        ("a b c d e", "a b c d e f", [("same", "a b c d e "), ("extra", "f")]),
        ("one two", "", []),
        ("", "one two", [("extra", "one two")]),
        ("", "", []),
    ],
)
def test_a_reply_is_compared_with_its_reference_word_by_word(reference: str, reply: str, marks: list[tuple[str, str]]) -> None:
    assert word_marks(reference, reply) == marks


def test_a_lone_common_word_among_changes_counts_as_changed() -> None:
    before, after = "a b c d e f g x y z and q r s", "a b c d e f g 1 2 3 and 4 5 6"
    assert word_marks(before, after) == [("same", "a b c d e f g "), ("missing", "x y z and q r s"), ("extra", "1 2 3 and 4 5 6")]


def test_texts_too_long_to_compare_are_not_marked_and_say_so() -> None:
    assert word_marks("word " * 3001, "word") is None
    assert word_marks("word " * 3000, "word " * 3000) == [("same", "word " * 3000)]
    text = page_of(RowTable((Row(1, "", "word " * 3001, "word", "", None, None),)))
    assert "Not marked: more than 3,000 words." in text


@given(st.text("ab ,.\n猫é", max_size=30), st.text("ab ,.\n猫é", max_size=30))
def test_the_marks_give_back_the_reply_and_the_references_words(reference: str, reply: str) -> None:
    marks = word_marks(reference, reply)
    assert marks is not None
    assert "".join(text for kind, text in marks if kind != "missing") == reply
    if marks and [kind for kind, _ in marks] != ["extra"]:
        rebuilt = "".join(text for kind, text in marks if kind != "extra")
        assert "".join(rebuilt.split()) == "".join(reference.split())


def test_marks_can_be_told_without_colours() -> None:
    text = page_of(RowTable((Row(4, "q", "one two three", "one three", "one two three four", 0.5, 0.75),)))
    assert "one <del>two</del>three</div>" in text and "one two three <ins>four</ins></div>" in text
    assert re.search(r"ins \{[^}]*text-decoration: underline", text) and re.search(r"del \{[^}]*line-through", text)


def test_long_texts_are_for_folding_and_short_ones_are_not() -> None:
    text = page_of(Table(("t",), [("x" * 900,), ("x" * 901,), ("\n" * 14,), ("short",)]))
    assert re.findall(r'<div class="(x[^"]*)"', text) == ["x", "x long", "x long", "x"]


def test_texts_find_their_own_direction(hostile: str) -> None:
    assert '<div class="x" dir="auto">שלום' in hostile


def luminance(colour: str) -> float:
    """The relative luminance of WCAG 2."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1, 2], ids=["light", "dark by the system", "dark by the button"])
def test_letters_can_be_read_on_every_paper(theme: int, pleasant: str) -> None:
    blocks = re.findall(r":root[^{]*\{([^}]*--paper: #[0-9a-f]{6}[^}]*)\}", pleasant)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[theme]))
    pairs = [("ink", "paper"), ("ink", "card"), ("ink", "hover"), ("ink", "code"), ("ink", "found"), ("ink", "unclear-paper"),
             ("soft", "paper"), ("soft", "card"), ("soft", "hover"), ("accent", "paper"), ("accent", "card")]  # fmt: skip
    pairs += [(name, f"{name}-paper") for name in ("better", "worse", "unclear", "none", "extra", "missing")]
    pairs += [(name, paper) for name in ("better", "worse", "unclear") for paper in ("card", "hover")]
    for letters, paper in pairs:
        darker, lighter = sorted((luminance(colours[letters]), luminance(colours[paper])))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (letters, paper)  # what WCAG asks of text


def test_both_dark_themes_are_one(pleasant: str) -> None:
    blocks = re.findall(r":root[^{]*\{([^}]*--paper: #[0-9a-f]{6}[^}]*)\}", pleasant)
    assert blocks[1].split() == blocks[2].split()


def test_a_theme_for_charts_is_handed_to_the_script() -> None:
    figure = Chart({"data": [], "layout": {}}, "", "")
    text = html(Page("", "", sections=(Section("", (figure,)),)), {"font": {"color": "#111"}}, {"font.color": "#eee"})
    themes = json.loads(re.findall(r'id="themes">(.*?)</script>', text)[0])
    assert themes == {"light": {"font": {"color": "#111"}}, "dark": {"font.color": "#eee"}}
