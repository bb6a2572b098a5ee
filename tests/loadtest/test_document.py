"""Documents can be read back, and one that can't is refused with a reason."""

import json
import math
from dataclasses import dataclass

import pytest

from loadtest import document


@dataclass(frozen=True, slots=True)
class Cell:
    name: str
    values: tuple[float, ...]


def test_a_saved_document_is_read_and_non_finite_numbers_are_null(tmp_path):
    path = tmp_path / "d.json"
    document.save(
        {"schema": "longspan-x/1", "cells": [Cell("ä", (1.5, math.nan, -math.inf))], 5: {"a": (1, None)}},
        path,
    )
    assert document.read(path, "longspan-x/1") == {
        "cells": [{"name": "ä", "values": [1.5, None, None]}],
        "5": {"a": [1, None]},
    }
    assert json.loads(path.read_text())["schema"] == "longspan-x/1"
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_that_fails_leaves_the_last_whole_document(tmp_path):
    path = tmp_path / "d.json"
    document.save({"schema": "longspan-x/1", "a": 1}, path)
    with pytest.raises(TypeError):
        document.save({"schema": "longspan-x/1", "a": object()}, path)
    with pytest.raises(ValueError, match="schema"):
        document.save({"a": 2}, path)
    assert document.read(path, "longspan-x/1") == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_another_document_is_refused(tmp_path):
    path = tmp_path / "d.json"
    with pytest.raises(document.DocumentError, match=r"can't be read"):
        document.read(path, "longspan-x/2")
    path.write_text("{")
    with pytest.raises(document.DocumentError, match=r"can't be read"):
        document.read(path, "longspan-x/2")
    path.write_text("[]")
    with pytest.raises(document.DocumentError, match=r"not a longspan-x document \(longspan-x/2\)"):
        document.read(path, "longspan-x/2")
    document.save({"schema": "longspan-x/1"}, path)
    with pytest.raises(document.DocumentError, match=r"of schema longspan-x/1, .*measure again"):
        document.read(path, "longspan-x/2")


def test_one_core_is_one():
    assert document.cores_of({"cores": 1, "cpu": "X"}) == "1 core of X"
    assert document.cores_of({"cores": 2, "cpu": "X"}) == "2 cores of X"
    assert document.cores_of({}) == "? cores of an unknown processor"
