"""The grammar: round trips over all forms, and errors that point at the place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_megatron.errors import SequenceError, UsageError
from composer_megatron.sequence import MAX_BLOCKS, CompositeSequence, Run

parse = CompositeSequence.parse
letters = st.text(alphabet="AM", min_size=1, max_size=60)


@st.composite
def texts(draw: st.DrawFn, depth: int = 2) -> tuple[str, str]:
    """A grammar text and, built beside it by other means, the letters that it stands for."""
    text, expected = "", ""
    for _ in range(draw(st.integers(1, 4))):
        if text and (text[-1].isdecimal() or draw(st.booleans())):  # "(A)x2" "1A" would read as x21
            text += draw(st.sampled_from(["+", " + ", " "]))
        kind = draw(st.sampled_from(["letter", "run", "group"] if depth else ["letter", "run"]))
        if kind == "group":
            inner, inner_letters = draw(texts(depth=depth - 1))
            times = draw(st.integers(1, 3))
            text += f"({inner})" + (f"x{times}" if times > 1 or draw(st.booleans()) else "")
            expected += inner_letters * times
        else:
            symbol, count = draw(st.sampled_from("AM")), draw(st.integers(1, 12)) if kind == "run" else 1
            text += symbol if kind == "letter" else f"{count}{symbol}"
            expected += symbol * count
    return text, expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2A4M", "AAMMMM"),
        ("AAMMMM", "AAMMMM"),
        ("2A+5M+2A+3M+1A+3M", "AAMMMMMAAMMMAMMM"),
        ("(2A4M)x4", "AAMMMM" * 4),
        (" ( A M ) x 2 ", "AMAM"),
        ("2A(1M)x3+A", "AAMMMA"),
        ("002A", "AA"),
        ("((A)x2M)x2", "AAMAAM"),
    ],
)
def test_known_texts(text: str, expected: str) -> None:
    assert parse(text).letters == expected


@given(texts())
def test_parse_agrees_with_expansion(case: tuple[str, str]) -> None:
    text, expected = case
    assert parse(text).letters == expected


@given(letters)
def test_every_format_reads_back(text: str) -> None:
    sequence = CompositeSequence(text)
    for shown in (str(sequence), sequence.format("+"), sequence.letters, f"({sequence})x1"):
        assert parse(shown) == sequence
    assert hash(parse(str(sequence))) == hash(sequence)


@given(letters)
def test_runs_counts_and_ratio(text: str) -> None:
    sequence = CompositeSequence(text)
    assert "".join(symbol * length for symbol, length in sequence.runs) == text
    assert all(one.symbol != two.symbol for one, two in zip(sequence.runs, sequence.runs[1:], strict=False))
    assert sequence.counts == {symbol: text.count(symbol) for symbol in "AM" if symbol in text}
    assert sum(sequence.counts.values()) == len(sequence) == len(text)
    factor = len(sequence) // sum(sequence.ratio.values())
    assert {symbol: part * factor for symbol, part in sequence.ratio.items()} == sequence.counts
    assert CompositeSequence.from_runs(sequence.runs) == sequence


@given(letters, letters, st.integers(1, 4))
def test_operators_follow_strings(one: str, two: str, times: int) -> None:
    first, second = CompositeSequence(one), CompositeSequence(two)
    assert (first + second).letters == one + two
    assert (first * times).letters == one * times
    assert list(first) == list(one)
    assert first[0] == one[0]
    assert (first == second) == (one == two)


def test_values() -> None:
    sequence = parse("2A4M")
    assert sequence.runs == (Run("A", 2), Run("M", 4))
    assert parse("8A16M").ratio == {"A": 1, "M": 2}
    assert sequence.count("A") == 2
    assert sequence.count("X") == 0
    assert len({parse("2A4M"), parse("AAMMMM"), parse("(A)x2+4M")}) == 1
    with pytest.raises(AttributeError):
        sequence.letters = "A"  # type: ignore[misc]


@given(st.text("AM", min_size=1, max_size=12), st.integers(1, 16))
def test_notation_reads_back_and_is_no_longer(unit: str, times: int) -> None:
    sequence = CompositeSequence(unit * times)
    assert parse(sequence.notation) == sequence
    assert len(sequence.notation) <= len(str(sequence))


@pytest.mark.parametrize("text", ["2A4M", "1A1M2A1M1A", "(AM)x32", "(2A4M)x4", "7A17M7A10M4A10M"])
def test_notation_of_known_sequences(text: str) -> None:
    assert parse(text).notation == text


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("", 0, "empty"),
        ("   ", 0, "empty"),
        ("2A4X", 3, "unknown primitive 'X'"),
        ("2a4M", 1, "'A' in upper case"),
        ("2A0M", 2, "count of at least 1"),
        ("000M", 0, "count of at least 1"),
        ("(2A4M", 0, "never closed"),
        ("A(2A(4M)", 1, "never closed"),
        ("2A)", 2, "closes nothing"),
        (")", 0, "closes nothing"),
        ("()", 1, "nothing before ')'"),
        ("(2A)x", 5, "no count after 'x'"),
        ("(2A)x0", 5, "count of at least 1"),
        ("2A++4M", 3, "unexpected '+'"),
        ("+A", 0, "unexpected '+'"),
        ("2A+", 3, "the text ends"),
        ("3", 1, "the text ends"),
        ("2-A", 1, "unexpected '-'"),
        ("9999999999A", 0, "huge"),
        ("(A)x999999", 10, "at most"),
        ("(" * 60 + "A" + ")" * 60, 50, "nested"),
    ],
)
def test_errors_name_text_position_and_expectation(text: str, position: int, words: str) -> None:
    with pytest.raises(SequenceError) as caught:
        parse(text)
    message = str(caught.value)
    assert caught.value.position == position
    assert words in message
    assert "expected" in message
    assert f"position {position}" in message
    assert isinstance(caught.value, UsageError)
    if text:
        pointer = message.splitlines()[-1]
        assert pointer.index("^") == position + 2


@given(st.text(alphabet="AM()x+ 0129Zé²٣", max_size=12))
def test_any_text_parses_or_fails_politely(text: str) -> None:
    try:
        sequence = parse(text)
    except SequenceError:
        return
    assert 1 <= len(sequence) <= MAX_BLOCKS
    assert parse(str(sequence)) == sequence


def test_constructor_refuses_unknown_letters() -> None:
    with pytest.raises(SequenceError, match="unknown primitive 'B'"):
        CompositeSequence("AB")
    with pytest.raises(SequenceError, match="empty"):
        CompositeSequence("")
