import io
import re
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_dataflow.engine.colors import colored, legend, plain_text, wants_color

STEPS = [step / 1000 for step in range(1001)]
PAINT = re.compile(r"\x1b\[38;5;(\d+);48;5;(\d+)m|\x1b\[0m")


def palette(number: int) -> tuple[float, float, float]:
    """Red, green and blue (0 to 1) of an entry of the colour cube in the 256-colour palette."""
    assert 16 <= number <= 231  # the others are the theme's to choose, or greys
    levels = (0, 95, 135, 175, 215, 255)
    return tuple(levels[digit] / 255 for digit in (*divmod((number - 16) // 6, 6), (number - 16) % 6))  # type: ignore[return-value]


def luminance(number: int) -> float:
    """The relative luminance of WCAG 2."""
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in palette(number)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def lightness(number: int) -> float:
    """CIE L*, 0 to 100; every palette colour used is above the linear part of its curve."""
    return float(116 * luminance(number) ** (1 / 3) - 16)


def colours(probability: float) -> tuple[int, int]:
    """The letters' and the background's numbers in the palette."""
    match = PAINT.match(colored("x", probability))
    assert match
    return int(match[1]), int(match[2])


def without_colours(text: str) -> str:
    return PAINT.sub("", text)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lightness_rises_with_the_probability_in_steps_that_can_be_seen() -> None:
    bands = [*dict.fromkeys(colours(each)[1] for each in STEPS)]
    rises = [lightness(higher) - lightness(lower) for lower, higher in pairwise(bands)]
    assert len(bands) == 8 and min(rises) > 5


def test_every_probability_has_the_colour_of_one_band() -> None:
    changes = [high for low, high in pairwise(STEPS) if colours(low) != colours(high)]
    assert changes == [0.01, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95]


def test_letters_can_be_read_on_every_band_whatever_the_terminals_own_colours() -> None:
    for letters, background in {colours(each) for each in STEPS}:
        darker, lighter = sorted((luminance(letters), luminance(background)))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5  # what WCAG asks of text


def test_blue_takes_part_in_the_scale_not_red_and_green_alone() -> None:
    blue = [palette(background)[2] for _, background in {colours(each) for each in STEPS}]
    assert max(blue) - min(blue) > 0.25


@pytest.mark.parametrize("odd", [float("nan"), -1.0])
def test_what_is_no_probability_has_the_lowest_colour(odd: float) -> None:
    assert colored("x", odd) == colored("x", 0.0)
    assert colored("x", 1.0000001) == colored("x", 1.0)


def test_a_token_is_painted_and_the_colour_taken_back() -> None:
    assert colored("word", 0.0) == "\x1b[38;5;231;48;5;53mword\x1b[0m"
    assert colored("word", 1.0) == "\x1b[38;5;16;48;5;227mword\x1b[0m"
    assert colored("", 0.5) == ""


def test_no_colour_is_on_where_a_line_ends() -> None:
    painted = colored("a\n\nb\n", 1.0)
    assert painted == "\x1b[38;5;16;48;5;227ma\x1b[0m\n\n\x1b[38;5;16;48;5;227mb\x1b[0m\n"


def test_the_legend_is_one_line_that_shows_every_band_in_its_colour() -> None:
    line = legend()
    assert without_colours(line) == ("probability of each token:  <1%  1-5%  5-20%  20-40%  40-60%  60-80%  80-95%  95-100% ")
    shown = [match.groups() for match in PAINT.finditer(line) if match[1]]
    assert shown == [tuple(map(str, colours(each))) for each in (0, 0.01, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95)]


@pytest.mark.parametrize(
    ("hostile", "expected"),
    [
        ("\x1b[2J\x1b[H", r"\x1b[2J\x1b[H"),  # clears the screen
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),  # sets the window's title
        ("\x1b]52;c;ZXZpbA==\x1b\\", "\\x1b]52;c;ZXZpbA==\\x1b\\"),  # writes the clipboard
        ("\x9b31m", r"\x9b31m"),  # the escape of one byte
        ("safe\rEVIL", r"safe\rEVIL"),  # writes over the line
        ("a\b\x7f\x00\x0b\x0c", r"a\x08\x7f\x00\x0b\x0c"),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),  # turns the writing direction
        ("a\u2028b\u2029c\x85d", r"a\u2028b\u2029c\x85d"),  # lines that are none
        ("\ud800", r"\ud800"),  # printing it would raise
        ("a\u200bb\ufeffc\U000e0041", r"a\u200bb\ufeffc\U000e0041"),  # cannot be seen
    ],
)
def test_what_a_terminal_would_obey_or_hide_is_shown_as_an_escape(hostile: str, expected: str) -> None:
    assert plain_text(hostile) == expected
    assert without_colours(colored(hostile, 0.5)) == expected


@pytest.mark.parametrize(
    "harmless",
    [
        "two\nlines\tand a tab",
        "naïve «ja» 日本語\u3000テスト",
        "10\u00a0€ Vraiment\u202f?",
        "नि\u200dक",
        "👩\u200d🔬 ❤️",
        "",
    ],
)
def test_what_people_write_stays_as_it_is(harmless: str) -> None:
    assert plain_text(harmless) == harmless


def test_a_long_text_is_not_cut() -> None:
    assert plain_text("\x1b" * 5000) == r"\x1b" * 5000
    assert plain_text("word " * 5000) == "word " * 5000


@given(st.text(st.characters()), st.floats())
def test_no_text_reaches_a_terminal_with_a_control_in_it(text: str, probability: float) -> None:
    printed = without_colours(colored(text, probability))
    assert printed == plain_text(text)
    categories = {unicodedata.category(each) for each in printed if each not in "\n\t\u200c\u200d"}
    assert categories.isdisjoint({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
    printed.encode()  # no half of a surrogate pair is left


def test_colours_are_wanted_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert wants_color(Terminal()) is True and wants_color(io.StringIO()) is False
    monkeypatch.delenv("TERM")
    assert wants_color(Terminal()) is True


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("NO_COLOR", "0"), ("TERM", "dumb")])
def test_colours_are_not_wanted_where_the_user_says_so(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv(name, value)
    assert wants_color(Terminal()) is False


def test_an_empty_no_color_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setenv("TERM", "xterm")
    assert wants_color(Terminal()) is True
