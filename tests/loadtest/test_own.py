import json

import pytest

from loadtest.tasks.own import read
from loadtest.tasks.score import score


def written(tmp_path, *rows):
    file = tmp_path / "own.jsonl"
    file.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8"
    )
    return file


def test_every_form_of_question(tmp_path):
    file = written(
        tmp_path,
        {"prompt": "Name a färg.", "contains": ["röd", "blå"]},
        "",
        {"context": "Long text.\n\n", "question": "One?", "contains": "yes", "answer_prefix": "Answer:"},
        {
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "json": {"a": [1]},
        },
        {"context": "Long text.", "question": "Two?", "regex": r"\bno\b", "max_new_tokens": 5},
        {"prompt": "Go on"},
    )
    samples = read(file)
    assert [(sample.index, sample.turn) for sample in samples] == [(0, 0), (1, 0), (2, 0), (1, 1), (3, 0)]
    prompt, one, chat, two, free = samples
    assert (prompt.context, prompt.question, prompt.answer) == ("Name a färg.", "", ("röd", "blå"))
    assert (one.context, one.question, one.answer_prefix) == ("Long text.\n", "One?", "Answer:")
    assert (two.context, two.match, two.max_new_tokens) == (one.context, "regex", 5)
    assert chat.messages == (("system", "s"), ("user", "u"))
    assert (score(chat, 'so {"b": {"a": [1.0]}}'), score(chat, "1")) == (1, 0)
    assert free.answer == ()
    assert all(sample.task == "own" and sample.target == "" and sample.length == 0 for sample in samples)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"prompt": "p", "json": NaN}', "not JSON"),
        ({"prompt": "p", "answer": "a"}, "unknown answer; there are prompt, context"),
        ({"contains": "a"}, "nothing to ask; give prompt"),
        ({"prompt": "p", "messages": []}, "prompt and messages"),
        ({"context": "p"}, "it has context"),
        ({"prompt": " "}, "prompt is not text"),
        ({"prompt": "p", "contains": "a", "regex": "b"}, "contains and regex; keep one"),
        ({"prompt": "p", "contains": []}, "contains is not text"),
        ({"prompt": "p", "contains": ["a", 1]}, "contains is not text"),
        ({"prompt": "p", "contains": ""}, "contains is not text"),
        ({"prompt": "p", "regex": "("}, "not a regular expression"),
        ({"prompt": "p", "regex": 1}, "regex is not text"),
        ({"prompt": "p", "max_new_tokens": True}, "max_new_tokens"),
        ({"prompt": "p", "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": "p", "answer_prefix": None}, "answer_prefix is not text"),
        ({"messages": []}, "messages is not a list"),
        ({"messages": [{"role": "user"}]}, "role and content"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, row, says):
    with pytest.raises(ValueError, match=rf"own\.jsonl, line 2: .*{says}"):
        read(written(tmp_path, {"prompt": "good"}, row))


def test_a_file_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match="has no question"):
        read(written(tmp_path, "", " "))
    (tmp_path / "own.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        read(tmp_path / "own.jsonl")
