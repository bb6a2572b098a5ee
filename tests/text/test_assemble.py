"""Tokens to deltas: text, token ids and the end of an output agree."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.messages import FinishReason, Logprob, PositionLogprob
from server.text.assemble import OutputAssembler
from server.text.decoding import Decoding
from server.text.stop import StopStrings


def logprob(token):
    return PositionLogprob(Logprob(token, -1.0, 1), [])


def feed(assembler, tokens, finish=FinishReason.LENGTH, logprobs=False):
    """All deltas, one token a time; stops where the assembler says that the sequence has ended."""
    deltas = []
    for index, token in enumerate(tokens):
        last = index == len(tokens) - 1
        deltas.append(
            assembler.push([token], [logprob(token)] if logprobs else None, finish if last else None)
        )
        if deltas[-1].finish is not None:
            break
    return deltas


def joined(deltas):
    return "".join(delta.text for delta in deltas), [token for delta in deltas for token in delta.token_ids]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_token_comes_before_its_text_and_all_come_in_the_end(tokenizer, data):
    text = data.draw(st.text(st.sampled_from("ab 🙂é東.\n"), min_size=1, max_size=40))
    stops = data.draw(st.lists(st.text("ab 🙂", min_size=1, max_size=3), max_size=2))
    tokens = tokenizer.encode(text)
    assembler = OutputAssembler(tokenizer, stop=StopStrings(stops))
    shown, given_tokens = "", []
    for delta in feed(assembler, tokens, logprobs=True):
        shown += delta.text
        given_tokens += delta.token_ids
        assert [entry.chosen.token for entry in delta.logprobs] == list(delta.token_ids)
        if delta.finish is None:
            # Every character of the tokens given so far has been shown.
            assert shown.startswith(tokenizer.decode(given_tokens).rstrip("\ufffd"))
    assert given_tokens == tokens[: assembler.token_count]
    assert not any(stop in shown for stop in stops)
    assert text.startswith(shown)


def test_a_stop_string_drops_the_tokens_after_it_and_asks_to_abort(tokenizer):
    tokens = tokenizer.encode("one two three four")
    assembler = OutputAssembler(tokenizer, stop=StopStrings(["three"]))
    delta = assembler.push(tokens)
    assert delta.text == "one two "
    assert (delta.finish, delta.matched, delta.abort) == (FinishReason.STOP, "three", True)
    assert tokenizer.decode(delta.token_ids) == "one two three"
    assert assembler.token_count == len(delta.token_ids)
    assert assembler.push(tokens).token_ids == ()


@pytest.fixture(scope="module")
def decoding(tokenizer):
    return Decoding.read(tokenizer.folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_fork_goes_on_by_itself_and_changes_nothing(tokenizer, decoding, data):
    """Of a text that the engine process decodes too, without transformers."""
    texts = st.text(st.sampled_from("ab 🙂é東.\n"), min_size=1, max_size=20)
    tokens, others = tokenizer.encode(data.draw(texts)), tokenizer.encode(data.draw(texts))
    stop = StopStrings(data.draw(st.lists(st.text("ab 🙂", min_size=1, max_size=3), max_size=2)))
    at = data.draw(st.integers(0, len(tokens) - 1))
    assembler = OutputAssembler(decoding, stop=stop)
    shown = [assembler.push([token]).text for token in tokens[:at]]
    fork = assembler.fork()
    of_fork = [*shown, *(delta.text for delta in feed(fork, others))]
    of_first = [*shown, *(delta.text for delta in feed(assembler, tokens[at:]))]
    for whole, found, ended in ((tokens, of_first, assembler), ([*tokens[:at], *others], of_fork, fork)):
        alone = OutputAssembler(tokenizer, stop=stop)
        assert "".join(delta.text for delta in feed(alone, whole)) == "".join(found)
        assert (alone.finish, alone.token_count) == (ended.finish, ended.token_count)


@pytest.mark.parametrize(("include", "text"), [(False, "one two "), (True, "one two three")])
def test_the_stop_string_is_shown_where_asked_for(tokenizer, include, text):
    assembler = OutputAssembler(tokenizer, stop=StopStrings(["three"]), include_stop_string=include)
    assert joined(feed(assembler, tokenizer.encode("one two three four")))[0] == text


def test_stop_strings_before_min_tokens_are_text(tokenizer):
    tokens = tokenizer.encode("stop and stop and stop")
    assembler = OutputAssembler(tokenizer, stop=StopStrings(["stop"]), min_tokens=2)
    text, _ = joined(feed(assembler, tokens))
    assert text == "stop and "


@pytest.mark.parametrize("keep", [False, True])
def test_the_token_that_ended_the_sequence_counts_but_has_no_text(tokenizer, keep):
    end = tokenizer.token_id(tokenizer.eos_token)
    tokens = [*tokenizer.encode("bye"), end]
    assembler = OutputAssembler(tokenizer, keep_special_tokens=keep)
    text, ids = joined(deltas := feed(assembler, tokens, FinishReason.STOP))
    assert ids == tokens
    assert text == ("bye" + tokenizer.decode([end], skip_special_tokens=False) if keep else "bye")
    assert (deltas[-1].matched, deltas[-1].abort) == (end, False)


def test_an_unfinished_character_is_shown_when_the_length_is_reached(tokenizer):
    tokens = tokenizer.encode("hi") + tokenizer.encode("🙂")[:-1]
    assembler = OutputAssembler(tokenizer)
    text, ids = joined(feed(assembler, tokens))
    assert text == tokenizer.decode(tokens)
    assert text.endswith("\ufffd")
    assert ids == tokens


END, TEXT = "<|im_end|>", "one two<|im_end|> three"


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("stops", "before", "matched"),
    [
        ([END], "one two", END),
        (["two<|im_end|>"], "one ", "two<|im_end|>"),
        (["<|im_end|> th", "three"], "one two", "<|im_end|> th"),
        (["zero", END, "o<|im_end|>"], "one two", END),
        # The token is one thing: no string ends within it.
        (["o<|im_start|>", "o<|im_end|><|im_end|>", "o <|im_end|>", "e"], "on", "e"),
    ],
)
def test_stop_strings_may_spell_special_tokens(tokenizer, stops, before, matched, keep, include, at_once):
    tokens = tokenizer.encode(TEXT)
    assert tokenizer.token_id(END) in tokens
    stop = StopStrings(stops, tokenizer.special_tokens)
    assembler = OutputAssembler(tokenizer, stop=stop, include_stop_string=include, keep_special_tokens=keep)
    deltas = [assembler.push(tokens)] if at_once else feed(assembler, tokens)
    text, ids = joined(deltas)
    assert text == before + (matched if include else "")
    assert (deltas[-1].finish, deltas[-1].matched) == (FinishReason.STOP, matched)
    assert ids == tokens[: assembler.token_count]
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    assert whole.startswith(before)
    assert matched in whole
    shorter = tokenizer.decode(ids[:-1], skip_special_tokens=False)
    assert matched not in shorter


@pytest.mark.parametrize(
    ("stops", "keep", "text", "matched"),
    [
        (["im_end"], False, "one two three", None),
        (["im_end"], True, "one two<|", "im_end"),
        (["im", "<|im_end|>"], False, "one two", "<|im_end|>"),
        (["|>", "x<|im_end|>"], False, "one two three", None),
        (["two three"], False, "one ", "two three"),
        (["two three", "x<|im_end|>"], False, "one ", "two three"),
        (["two th", "<|im_end|> three"], False, "one ", "two th"),
        (["two th", "<|im_end|> t"], False, "one two", "<|im_end|> t"),
        (["two three"], True, TEXT, None),
    ],
)
def test_special_tokens_without_text_match_as_wholes_only(tokenizer, stops, keep, text, matched):
    stop = StopStrings(stops, tokenizer.special_tokens)
    deltas = feed(OutputAssembler(tokenizer, stop=stop, keep_special_tokens=keep), tokenizer.encode(TEXT))
    assert (joined(deltas)[0], deltas[-1].matched) == (text, matched)


def test_the_spelling_of_a_special_token_in_ordinary_tokens_matches_too(tokenizer):
    tokens = [token for piece in ("hi ", "<|", "im_", "end", "|>", "x") for token in tokenizer.encode(piece)]
    assert not tokenizer.special_token_ids & set(tokens)
    deltas = feed(OutputAssembler(tokenizer, stop=StopStrings([END], tokenizer.special_tokens)), tokens)
    assert (joined(deltas)[0], deltas[-1].matched) == ("hi ", END)


@pytest.mark.parametrize("include", [False, True])
def test_a_special_token_that_ended_the_sequence_is_the_stop_string_that_spells_it(tokenizer, include):
    tokens = tokenizer.encode("bye<|im_end|>")
    stop = StopStrings([END], tokenizer.special_tokens)
    assert stop.token_ids == {tokens[-1]}
    deltas = feed(
        OutputAssembler(tokenizer, stop=stop, include_stop_string=include), tokens, FinishReason.STOP
    )
    assert joined(deltas) == ("bye<|im_end|>" if include else "bye", tokens)
    assert (deltas[-1].matched, deltas[-1].abort) == (END, False)


def test_of_special_tokens_that_begin_alike_the_longest_is_meant():
    stop = StopStrings(["a<s>b", "<s>", "<s><s>>"], {"<s>": 1, "<s>>": 2, "<t>": 3, "": 4})
    one, two = stop.marks[1], stop.marks[2]
    assert stop.marks.keys() == {1, 2}
    assert stop.token_ids == {1}
    assert [pattern for pattern in stop.patterns if one in pattern or two in pattern] == [
        *(f"a{one}b", one, one + two)
    ]
