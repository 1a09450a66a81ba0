"""Elements: whatever text goes in comes out of a parser again, and nothing else."""

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from composer_search.report.markup import Column, Markup, decimal, element, integer, join, table


class Recorder(HTMLParser):
    """Notes tags and texts in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@given(st.text(), st.text())
def test_element_keeps_any_text(text, value):
    found = Recorder(element("p", text, title=value))
    ((tag, attributes),) = found.tags
    assert tag == "p" and attributes.keys() == {"title"}
    for shown, meant in ((found.text, text), (attributes["title"], value)):
        assert len(shown) == len(meant)
        for a, b in zip(shown, meant, strict=True):
            assert a == b or (a == "\ufffd" and not (b.isalnum() or b in "\n\t<>&\"' "))
    assert element("p", text).encode()  # no lone surrogate is left


def test_attributes():
    written = element("th", "a", class_="number", aria_label='"', tabindex=0, hidden=True, id=None, open=False)
    assert written == '<th class="number" aria-label="&quot;" tabindex="0" hidden>a</th>'


def test_markup_is_not_escaped_twice():
    inner = element("b", "1 < 2")
    assert element("p", inner, " & ") == "<p><b>1 &lt; 2</b> &amp; </p>"
    assert join(["<", Markup("<br>")], "&") == "&lt;&amp;<br>"


def test_numbers_carry_their_exact_value():
    assert decimal(-0.12345, 2) == '<data value="-0.12345">−0.12</data>'
    assert integer(1_235_814_400) == '<data value="1235814400">1,235,814,400</data>'


def test_table_heads_its_rows_and_columns():
    written = Recorder(table("Costs", [Column("Model"), Column("Size", numeric=True)], [("a<b", "1"), ("c", "2")]))
    heads = [attributes.get("scope") for tag, attributes in written.tags if tag == "th"]
    assert heads == ["col", "col", "row", "row"] and written.text == "CostsModelSizea<b1c2"
