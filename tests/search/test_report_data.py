"""The text of sequences; `test_report` checks what is read from files, broken ones included."""

from hypothesis import given
from hypothesis import strategies as st

from composer_megatron.sequence import CompositeSequence
from composer_search.report.data import notation


@given(st.text("AM", min_size=1, max_size=12), st.integers(1, 16))
def test_notation_reads_back(unit, times):
    sequence = CompositeSequence(unit * times)
    assert CompositeSequence.parse(notation(sequence)) == sequence
    assert len(notation(sequence)) <= len(str(sequence))


def test_notation_of_known_sequences():
    texts = ("2A4M", "1A1M2A1M1A", "(AM)x32", "(2A4M)x4", "7A17M7A10M4A10M")
    assert [notation(CompositeSequence.parse(text)) for text in texts] == list(texts)
