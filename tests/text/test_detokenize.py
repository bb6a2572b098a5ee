"""Text that arrives token by token, with the default model's real tokenizer."""

import random
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.text.detokenize import Detokenizer

TEXTS = [
    "The quick brown fox.",
    "  leading spaces,\n\n\ttabs and\r\nlines  ",
    "Größe, naïve, Ελληνικά, русский",
    "東京 は 日本 の 首都 です。",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 é combining",
    "한국어와 العربية",
    "mixed: a🙂b東c",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_are_whole_characters(tokenizer, text):
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push([token]) for token in tokenizer.encode(text)] + [detokenizer.flush()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tokens_give_what_decoding_them_all_gives(tokenizer, data):
    # Byte tokens come often, so that characters break off and bytes stand where none may.
    ids = st.one_of(st.integers(0, tokenizer.vocabulary_size - 1), st.integers(0, 300))
    tokens = data.draw(st.lists(ids, max_size=60))
    skip = data.draw(st.booleans())
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    text = "".join(detokenizer.push([token]) for token in tokens) + detokenizer.flush()
    assert text == tokenizer.decode(tokens, skip_special_tokens=skip)


def test_an_unfinished_character_is_held_back_and_shown_at_the_end(tokenizer):
    tokens = tokenizer.encode("🙂")
    assert len(tokens) > 1
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(tokens[:-1]) == ""
    assert detokenizer.held > 0
    assert detokenizer.flush() == tokenizer.decode(tokens[:-1])


def test_several_tokens_at_once_are_the_same_as_one_by_one(tokenizer):
    tokens = tokenizer.encode(" ".join(TEXTS))
    rng = random.Random(0)
    detokenizer, text, rest = Detokenizer(tokenizer), "", tokens
    while rest:
        size = rng.randint(1, 7)
        text += detokenizer.push(rest[:size])
        rest = rest[size:]
    assert text + detokenizer.flush() == " ".join(TEXTS)


def test_a_token_costs_no_more_at_the_end_of_a_long_text(tokenizer):
    """The window that is decoded again stays short, whatever came before."""
    detokenizer = Detokenizer(tokenizer)
    longest = 0
    inner = detokenizer._decode

    def watch(tokens):
        nonlocal longest
        longest = max(longest, len(tokens))
        return inner(tokens)

    detokenizer._decode = watch
    began = time.monotonic()
    for token in tokenizer.encode("All work and no play 🙂. " * 400):
        detokenizer.push([token])
    assert longest <= 64
    assert time.monotonic() - began < 30
