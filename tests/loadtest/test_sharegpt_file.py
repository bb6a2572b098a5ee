"""Files in ShareGPT's own format."""

import json

import pytest

from loadtest.load.drawing import Known, drawing
from loadtest.load.sharegpt_file import Conversations
from loadtest.load.types import Wanted
from loadtest.load.workloads import WorkloadError


def words(text):
    return len(text.split())


def talk(*values, names=("human", "gpt")):
    return [{"from": names[index % 2], "value": value} for index, value in enumerate(values)]


def text(count, word="word"):
    return " ".join([word] * count)


@pytest.fixture
def write(tmp_path):
    def save(content, name="share.json"):
        file = tmp_path / name
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        file.write_bytes(content)
        return file

    return save


def entries(count):
    return [{"id": str(i), "conversations": talk(text(5 + i, f"q{i}"), text(4 + i))} for i in range(count)]


def test_a_question_is_the_prompt_and_its_answer_the_length(write):
    drawn = Conversations(write(entries(50))).draw(20, 3, Wanted(), words)
    assert [session.index for session in drawn] == list(range(20))
    for session in drawn:
        (turn,) = session.turns
        number = int(turn.prompt.split()[0][1:])
        assert (words(turn.prompt), turn.output_tokens) == (5 + number, 4 + number)
    assert len({session.turns[0].prompt for session in drawn}) == 20, "without replacement"
    conversations = Conversations(write(entries(50)))
    assert conversations.draw(20, 3, Wanted(), words) == drawn
    assert conversations.draw(20, 4, Wanted(), words) != drawn
    assert len(conversations.draw(120, 3, Wanted(), words)) == 120, "from the beginning again"


def test_the_filters_are_those_of_the_fields_benchmark(write):
    kept = (4, 4), (1024, 1024), (1000, 1048)
    left_out = (3, 50), (50, 3), (1025, 4), (1000, 1049)
    file = write([{"conversations": talk(text(q), text(a))} for q, a in (*kept, *left_out)])
    drawn = Conversations(file).draw(100, 0, Wanted(), words)
    assert {(words(s.turns[0].prompt), s.turns[0].output_tokens) for s in drawn} == set(kept)
    fixed = Conversations(file).draw(100, 0, Wanted(output_tokens=2), words, 60)
    assert {(words(s.turns[0].prompt), s.turns[0].output_tokens) for s in fixed} == {(4, 2)}
    with pytest.raises(WorkloadError, match=r"of the 7 conversations .* none is left: 7 too long; raise"):
        Conversations(file).draw(1, 0, Wanted(most_prompt_tokens=2, most_total_tokens=4), lambda _: 5)


def test_whole_conversations(write):
    turns = talk(text(4, "a"), text(5), text(6, "b"), text(7), text(8, "c"), text(2))
    conversations = Conversations(write([{"conversations": [{"from": "system", "value": "x"}, *turns]}]))

    def drawn(**wanted):
        (session,) = conversations.draw(1, 0, Wanted(**wanted), words)
        return [(turn.prompt[0][1][0], turn.output_tokens) for turn in session.turns]

    assert drawn(turns=5) == [("a", 5), ("b", 7)], "the third answer is too short"
    assert drawn(turns=1) == [("a", 5)]
    assert drawn(turns=5, most_total_tokens=20) == [("a", 5)]
    assert drawn(turns=5, output_tokens=3) == [("a", 3), ("b", 3), ("c", 3)]
    (session,) = conversations.draw(1, 0, Wanted(turns=2), words)
    assert session.turns[0].prompt == [("user", text(4, "a"))]


def test_contents_of_real_files(write):
    odd = [
        {"id": "empty", "conversations": []},
        {
            "id": "answer first",
            "conversations": talk("hello there my friend", text(9), names=("gpt", "human")),
        },
        {"conversations": talk("Grüße \\ 東京 🙂 naïve", "ok fine yes sure", names=("user", "chatgpt"))},
    ]
    raw = "\ufeff \n" + json.dumps(odd, ensure_ascii=False, indent=2).replace("naïve", "na\\ud800ve") + "\n"
    (session,) = Conversations(write(raw.encode())).draw(1, 0, Wanted(), words)
    assert session.turns[0].prompt == "Grüße \\ 東京 🙂 na\ufffdve"
    session.turns[0].prompt.encode()


def test_a_file_larger_than_one_read(write):
    many = [{"conversations": talk(text(200, f"q{i}"), text(300, 'ä"]},'))} for i in range(2000)]
    file = write(json.dumps(many, ensure_ascii=False).encode())
    assert file.stat().st_size > 4 << 20
    assert len(Conversations(file)) == 2000


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not a JSON list of conversations"),
        (b'{"conversations": []}', "is not a JSON list"),
        (b"[]", "has no conversation with a question and an answer"),
        (b'[{"conversations": []}, {"id": 1}]', "entry 2: has no list called conversations"),
        (b'[{"conversations": [{"from": "human"}]}]', "entry 1: a turn lacks the text from or value"),
        (b'[{"conversations": [1]}]', "entry 1: a turn lacks"),
        (b'[{"conversations": []} {}]', "after entry 1 comes '{' instead of a comma"),
        (b'[{"conversations": []}', "ends after entry 1 without a closing bracket; is it whole"),
        (b'[{"conversations": []}, {"conv', "entry 2: is not JSON"),
        (b'[{"conversations": []},]', "entry 2: is not JSON"),
        (b'[{"conversations": [{"from": "human", "value": "\xff"}]}]', "can't be read"),
    ],
)
def test_a_file_that_is_none_is_refused(write, content, sentence):
    with pytest.raises(WorkloadError, match=sentence):
        Conversations(write(content))


def test_as_a_workload(write, tmp_path):
    file = write(entries(30))
    described, draw = drawing(Wanted(str(file), most_prompt_tokens=20), Known(0, 500, words))
    assert (described["conversations"], described["most_prompt_tokens"]) == (30, 20)
    assert "prompt_tokens" not in described
    assert not described.get("fresh")
    assert all(words(session.turns[0].prompt) <= 20 for session in draw(9, 1))
    with pytest.raises(WorkloadError, match="counted with --tokenizer"):
        drawing(Wanted(str(file)), Known())
    with pytest.raises(WorkloadError, match="can't be read"):
        drawing(Wanted(str(tmp_path / "none.json")), Known(0, 500, words))
    with pytest.raises(WorkloadError, match=r"there is no workload 'share\.txt'"):
        drawing(Wanted("share.txt"), Known())
    with pytest.raises(WorkloadError, match="give its --tokenizer"):
        drawing(Wanted(), Known())
