"""Tables of figures in terminals of any width."""

import io
import math

import pytest
from rich.console import Console
from rich.text import Text

from loadtest.columns import Columns, figure


def shown(table, width):
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12345.6, "12,346"),
        (100.2, "100"),
        (99.94, "99.9"),
        (9.876, "9.88"),
        (0.1, "0.10"),
        (0.01234, "0.0123"),
        (0.0000123, "1.2e-05"),
        (0.0, "0.00"),
        (math.nan, "-"),
        (math.inf, "-"),
    ],
)
def test_a_figure_has_three_digits(value, text):
    assert figure(value) == text


@pytest.mark.parametrize("width", [24, 40, 80, 300])
def test_no_column_and_no_digit_is_lost(width):
    heads = [f"head{number}\nms" for number in range(12)]
    table = Columns("name", heads)
    rows = {name: [f"{name[0]}{number:05}" for number in range(12)] for name in ("alpha", "b" * 30)}
    for name, cells in rows.items():
        table.add_row(name, *cells[:11], Text(cells[11], style="red"))
    table.add_row("short", "only")
    text = shown(table, width)
    assert max(map(len, text.splitlines())) <= width
    words = text.split()
    for head in heads:
        assert words.count(head.split("\n")[0]) == 1
    for cells in rows.values():
        assert [words.count(cell) for cell in cells] == [1] * 12
    assert words.count("only") == 1
    parts = words.count("name")
    assert words.count("alpha") == parts
    assert (parts == 1) == (width == 300)
    assert ("b" * 30 in text) == (width == 300), "a long name folds where room is short"
