import math
import re
import sys
from collections import Counter
from dataclasses import replace

import pytest
from tokenizers import Tokenizer

from loadtest import texts
from loadtest.tasks import needles, shared, words
from loadtest.tasks.haystack import DEPTHS
from loadtest.tasks.registry import TASKS, make
from loadtest.tasks.score import score
from loadtest.tasks.types import Sample

TEXT = texts.prose(texts.reference())
LENGTHS = (1024, 4096)
TURNS = {
    "needles": needles.MAX_NEEDLES,
    "scbench_kv": shared.MAX_TURNS,
    "scbench_prefix_suffix": shared.MAX_TURNS,
    "scbench_vt": shared.MAX_CHAINS,
}


def by_characters(text):
    """A tokenizer with four characters a token."""
    return (len(text) + 3) // 4


def by_words(text):
    """A tokenizer that takes words and cuts digits apart, as many do."""
    return len(re.findall(r"\d|[^\W\d]+|[^\w\s]|\n", text))


def samples(task, length=1024, index=0, seed=0, turns=24, count=by_characters, **options):
    return make(task, count, TEXT, length, index, seed, turns, **options)


def tokens(sample, count):
    prompt = count(sample.context) + count(sample.question) + count(sample.answer_prefix)
    return prompt + sample.max_new_tokens


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("count", [by_characters, by_words])
def test_every_task(task, length, count):
    """Laws of all tasks: one context, its size, where the answer is, and that the right answer is right."""
    made = samples(task, length, index=3, count=count, reserve=20)
    assert 1 <= len(made) <= TURNS.get(task, 1)
    assert len({sample.context for sample in made}) == 1
    assert [sample.turn for sample in made] == list(range(len(made)))
    size = max(tokens(sample, count) for sample in made) + 20
    assert length - 120 < size <= length
    for sample in made:
        assert (sample.task, sample.length, sample.index) == (task, length, 3)
        assert sample.context.endswith("\n")
        assert not sample.context.endswith("\n\n")
        assert all(entry in sample.context for entry in sample.answer)
        assert score(sample, sample.target) == 1
        assert score(sample, "I do not know.") == 0
        assert sample.target.startswith(" ")
        assert not sample.answer_prefix.endswith(" ")
        asked = sample.question + sample.answer_prefix
        assert not any(entry in asked for entry in sample.answer)
        if sample.depth is not None:
            place = sample.context.index(sample.answer[0]) / len(sample.context)
            assert sample.depth <= place < sample.depth + 0.06
    # Other questions about the context have other answers.
    assert len({sample.answer for sample in made}) == len(made)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_keep_their_size_in_one_piece(default_model, task):
    """By the default model's own tokenizer, which may join what was counted apart."""
    tokenizer = Tokenizer.from_file(str(default_model / "tokenizer.json"))

    def count(text):
        return len(tokenizer.encode(text, add_special_tokens=False))

    made = samples(task, count=count)
    for sample in made:
        whole = count(sample.context + sample.question + sample.answer_prefix) + sample.max_new_tokens
        assert whole <= 1024
        assert whole == tokens(sample, count)
        # The answer has room, and goes on where the prompt ends.
        target = count(sample.target)
        assert target <= sample.max_new_tokens
        assert count(sample.answer_prefix + sample.target) == count(sample.answer_prefix) + target


@pytest.mark.parametrize("task", TASKS)
def test_samples_depend_only_on_seed_and_index(task):
    first = samples(task)
    assert samples(task) == first
    others = [samples(task, index=1), samples(task, seed=1)]
    assert len({made[0].context for made in [first, *others]}) == 3
    assert len({made[0].answer for made in [first, *others]}) == 3


@pytest.mark.parametrize("task", TASKS)
def test_a_context_is_the_longest_that_fits_and_costs_few_calls(task):
    """With one token less to use, it is no longer; and the least length is told right."""
    calls = Counter()

    def count(text):
        calls[text] += 1
        return by_characters(text)

    made = samples(task, 4096, turns=1, count=count)
    assert max(calls.values()) == 1
    assert len(calls) < 20
    size = tokens(made[0], by_characters)
    assert samples(task, 4096, turns=1, reserve=4096 - size)[0].context == made[0].context
    assert len(samples(task, 4096, turns=1, reserve=4096 - size + 1)[0].context) < len(made[0].context)
    with pytest.raises(ValueError, match="needs at least") as refused:
        samples(task, 60, turns=1)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    assert 60 < least < 1000


@pytest.mark.parametrize(
    "name", ["niah_single_1", "niah_single_2", "niah_multikey_2", "passkey", "kv_retrieval"]
)
def test_forty_contexts_ask_at_all_forty_depths(name):
    found = sorted(samples(name, 1024, index)[0].depth for index in range(40))
    assert all(abs(depth - wanted) < 0.15 for depth, wanted in zip(found, DEPTHS, strict=True))
    assert found[0] < 0.1
    assert found[-1] > 0.85


@pytest.mark.parametrize(
    ("name", "keys", "needles_there", "answers"),
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_single_3", 1, 1, 1),
        ("niah_multikey_1", 4, 4, 1),
        ("niah_multivalue", 1, 4, 4),
        ("niah_multiquery", 4, 4, 4),
    ],
)
def test_as_many_needles_as_ruler_hides(name, keys, needles_there, answers):
    sample = samples(name)[0]
    found = re.findall(r"magic \w+ for (\S+) is: (\S+)\.", sample.context)
    assert len(found) == len({value for _, value in found}) == needles_there
    assert len({key for key, _ in found}) == keys
    asked = [value for key, value in found if key in sample.question]
    assert sorted(asked) == sorted(sample.answer)
    assert len(asked) == answers


def test_haystacks_of_needles_have_every_key_once():
    for name in ("niah_multikey_2", "niah_multikey_3"):
        lines = samples(name, 4096)[0].context.splitlines()[1:]
        keys = [re.search(r"for (\S+) is:", line)[1] for line in lines]
        assert len(keys) == len(set(keys)) > 30


@pytest.mark.parametrize(("name", "chains"), [("vt", 1), ("scbench_vt", 8)])
def test_variables_are_assigned_in_order_along_chains_of_four_hops(name, chains):
    made = samples(name, 4096)
    assert len(made) == chains
    for sample in made:
        example, text = sample.context.split("\n\n")
        value = re.search(r"value (\d+)", sample.question)[1]
        known = {value: 0}
        for target, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
            if source in known:
                known[target] = known[source] + 1
        assert [key for key in known if key != value] == list(sample.answer)
        assert list(known.values()) == [0, 1, 2, 3, 4, 5]
        assert len(re.findall("VAR", example)) == 9
        assert all(f"VAR {name} =" in example for name in example.rsplit(":", 1)[1].split())


@pytest.mark.parametrize(("length", "repeats", "rare"), [(2048, 6, 1), (8192, 30, 3)])
def test_common_words_are_as_common_as_in_ruler(length, repeats, rare):
    sample = samples("cwe", length)[0]
    example, text = sample.context.split("\n\n")
    counted = Counter(re.findall(r"\d+\. ([^\d]+?)(?= \d|\n|$)", text))
    assert {word for word, number in counted.items() if number == repeats} == set(sample.answer)
    assert set(counted.values()) == {repeats, rare}
    assert not any(f" {word} " in example for word in sample.answer)


def test_frequent_words_are_so_by_rank():
    sample = samples("fwe", 8192)[0]
    text = sample.context.split("\n")[1].split()
    ranked = Counter(text).most_common(5)
    assert ranked[0][0] == "..."
    assert [word for word, _ in ranked[1:4]] == list(sample.answer)
    assert ranked[3][1] > ranked[4][1]
    # A zeta distribution with alpha 2: the second has a quarter of the first's share.
    assert ranked[0][1] / ranked[1][1] == pytest.approx(4, rel=0.02)


def test_strings_share_beginnings_and_ends_but_not_both():
    made = samples("scbench_prefix_suffix", 4096)
    lines = made[0].context.splitlines()[1:]
    ends = Counter((line[:4], line[-4:]) for line in lines)
    assert max(ends.values()) == 1
    for sample in made:
        begin, end = re.search(r"begins with (\w+) and ends with (\w+)", sample.question).groups()
        assert sum(line.startswith(begin) for line in lines) > 1
        assert sum(line.endswith(end) for line in lines) > 1


def test_needles_are_spread_over_the_text_and_asked_in_no_order():
    made = samples("needles", 4096)
    depths = [sample.depth for sample in made]
    assert len(made) == needles.MAX_NEEDLES
    for number, depth in enumerate(sorted(depths)):
        assert depth == pytest.approx((number + 0.5) / len(made), abs=0.03)
    assert depths != sorted(depths)
    orders = [[sample.depth for sample in samples("needles", 4096, index)] for index in range(20)]
    firsts = sum(order[0] for order in orders) / 20
    assert 0.3 < firsts < 0.7
    assert len(samples("needles", 4096, turns=5)) == 5


@pytest.mark.parametrize("name", ["niah_single_2", "needles"])
def test_an_answer_that_the_text_has_already_is_not_hidden(name):
    value = samples(name)[0].answer[0]
    again = make(name, by_characters, f"{TEXT} {value} is here.", 1024, 0, 0)
    assert value not in again[0].answer


def test_a_short_text_is_repeated_and_an_unpunctuated_one_cut():
    table = " ".join(f"cell{number}" for number in range(100))
    sample = make("niah_single_2", by_characters, f"One sentence. {table}", 2048, 0, 0)[0]
    assert tokens(sample, by_characters) > 2048 - 70
    assert sample.context.count("One sentence.") > 5


def test_impossible_tasks_are_refused():
    with pytest.raises(ValueError, match="no task 'nix'; there are needles, niah_single_1"):
        make("nix", by_characters, TEXT, 1024, 0, 0)
    with pytest.raises(ValueError, match="at least 1 question"):
        make("needles", by_characters, TEXT, 1024, 0, 0, 0)
    with pytest.raises(ValueError, match="the text has no words"):
        make("niah_single_2", by_characters, " \n", 1024, 0, 0)
    with pytest.raises(ValueError, match=r"cwe can fill \d+ tokens, not 1000000"):
        make("cwe", by_characters, "", 1_000_000, 0, 0)


def test_without_the_package_of_words_only_the_tasks_that_draw_from_it_are_refused(monkeypatch):
    words.category.cache_clear()
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    for name in ("needles", "passkey", "vt", "fwe", "scbench_kv", "scbench_prefix_suffix"):
        assert samples(name)
    with pytest.raises(ValueError, match="wonderwords, which is not installed; run"):
        samples("niah_single_1")


SAMPLE = Sample("own", "", "", "", (), 8, "", 0)


@pytest.mark.parametrize(
    ("match", "answer", "predicted", "expected"),
    [
        ("all", ("Alpha", "beta", "gamma", "delta"), "ALPHA and Beta", 0.5),
        ("all", ("12",), "3124", 1),  # RULER's containment
        ("regex", (r"(?<!\d)12(?!\d)",), "3124", 0),
        ("regex", (r"(?<!\d)12(?!\d)",), "is 12.", 1),
        ("json", ("5",), "it is 5.", 1),
        ("json", ("5",), "It is 5, or so", 1),
        ("json", ("5",), "15, 5th, 5.5, x5, -5, 1.5", 0),
        ("json", ("5.0",), "5", 1),
        ("json", ("true",), "1", 0),
        ("json", ("1",), "true", 0),
        ("json", ("true",), "untrue", 0),
        ("json", ('{"a": [1, {"b": null}]}',), 'Sure: ```{"x": {"a": [1, {"b": null}]}}``` ok', 1),
        ("json", ('{"a": 1}',), '{"a": 1, "b": 2}', 0),
        ("json", ('{"a": 1}',), '{"a": true}', 0),
        ("json", ('"a"',), 'say "a"', 1),
        ("json", ('"a"',), "say a", 0),
        ("json", ("[1, 2]",), "[[[1, 2", 0),
        ("json", ("null",), "[" * 3_000, 0),
    ],
)
def test_score(match, answer, predicted, expected):
    assert score(replace(SAMPLE, match=match, answer=answer), predicted) == expected


def test_score_without_a_known_answer():
    assert math.isnan(score(SAMPLE, "anything"))
