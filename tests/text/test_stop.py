"""Stop strings found in a text that comes in pieces, against their definition on the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.stop import StopMatcher, StopStrings, _Search

letters = st.text("ab", max_size=30)
strings = st.lists(st.text("ab", min_size=1, max_size=5), max_size=3)


def first_complete(text, stops):
    """The stop string that is complete first: where it begins, and which; ``None`` if none is."""
    for end in range(1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return end - len(stop), stop
    return None


@given(text=letters, stops=strings, cuts=st.lists(st.integers(1, 6)), include=st.booleans())
def test_pieces_give_what_the_whole_text_gives(text, stops, cuts, include):
    matcher = StopMatcher(StopStrings(stops), include=include)
    found = first_complete(text, stops)
    allowed = text if found is None else text[: found[0] + (len(found[1]) if include else 0)]
    shown, rest = "", text
    for cut in [*cuts, len(text)]:
        piece, rest = rest[:cut], rest[cut:]
        shown += matcher.feed(piece)
        assert allowed.startswith(shown), "text at or after the stop string was passed on"
    shown += matcher.flush()
    assert shown == allowed
    assert matcher.matched == (None if found is None else found[1])


@given(text=letters, stops=strings)
def test_no_more_is_held_back_than_a_stop_string_could_need(text, stops):
    matcher = StopMatcher(StopStrings(stops))
    for end, letter in enumerate(text, 1):
        matcher.feed(letter)
        if matcher.matched is None:
            tail = text[end - matcher.held : end]
            assert matcher.held == 0 or any(stop.startswith(tail) for stop in stops)


def test_of_two_that_end_together_the_one_given_first_counts():
    for stops in (["cd", "bcd"], ["bcd", "cd"]):
        matcher = StopMatcher(StopStrings(stops))
        matcher.feed("abcd")
        assert matcher.matched == stops[0]


def test_a_string_complete_before_it_is_accepted_is_text():
    matcher = StopMatcher(StopStrings(["stop"]))
    assert matcher.feed("a stop ", accept=False) == "a stop "
    assert matcher.feed("b stop c") == "b "
    assert matcher.matched == "stop"


@pytest.mark.parametrize("include", [False, True])
def test_nothing_comes_after_a_match(include):
    matcher = StopMatcher(StopStrings(["."]), include=include)
    assert matcher.feed("one.two") == ("one." if include else "one")
    assert matcher.feed("three") == matcher.flush() == ""


MARKED = StopStrings(["ab<s>", "aba", "<s><s>b", "bb"], {"<s>": 1})
MARK = MARKED.marks[1]


@given(pieces=st.lists(st.sampled_from(["a", "b", "ab", MARK])))
def test_marks_part_only_what_spells_them(pieces):
    """Against the definition: the text with its marks, or without them for strings that spell none."""
    plain = [pattern for pattern in MARKED.patterns if MARK not in pattern]
    matcher, shown = StopMatcher(MARKED), ""
    for index, piece in enumerate(pieces):
        shown += matcher.feed(piece)
        whole = "".join(pieces[: index + 1])
        letters = whole.replace(MARK, "")
        ends = [pattern for pattern in MARKED.patterns if MARK in pattern and pattern in whole]
        ends += [pattern for pattern in plain if pattern in letters]
        assert bool(ends) == (matcher.matched is not None)
        if matcher.matched is not None:
            assert matcher.matched in {MARKED.patterns[pattern] for pattern in ends}
            assert letters.startswith(shown)
            return
        assert shown + matcher._buffer.replace(MARK, "") == letters
    assert shown + matcher.flush() == "".join(pieces).replace(MARK, "")


def test_a_match_takes_steps_in_proportion_to_the_text(monkeypatch):
    steps = 0
    border = _Search._border

    def counted(search, length):
        nonlocal steps
        steps += 1
        return border(search, length)

    monkeypatch.setattr(_Search, "_border", counted)
    matcher = StopMatcher(StopStrings(["a" * 1000 + "b"]))
    text = ("a" * 1500 + "c") * 4
    assert "".join(matcher.feed(letter) for letter in text) + matcher.flush() == text
    assert 0 < steps <= 2 * len(text)
