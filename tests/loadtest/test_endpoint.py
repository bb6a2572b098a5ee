"""A load on a server with OpenAI's HTTP interface: a double in a process of its own, on good and bad days."""

import asyncio
import json
import math
import socket
import time

import pytest
from typer.testing import CliRunner

from loadtest.cli.application import application
from loadtest.load import asked, driver, examine, result
from loadtest.load.drawing import Known
from loadtest.load.measures import summarize
from loadtest.load.over_http import http_sender
from loadtest.load.targets import Endpoint, EndpointError, Server
from loadtest.load.tokens import Counter, counter, spread_evenly
from loadtest.load.types import ClosedLoop, LoadTestError, Session, Turn
from loadtest.measuring.records import Record
from tests.api.conftest import save_tokenizer, until
from tests.loadtest import openai_double


@pytest.fixture(scope="module")
def address():
    with openai_double.running() as url:
        yield url


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return str(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def ask(endpoint, turn):
    async def send():
        record = Record(0, 0, 0.0, 0.0, expected_tokens=turn.output_tokens)
        async with http_sender(endpoint) as sender:
            text = await sender.send(turn, record)
            sender.finish()
        return text, record

    return asyncio.run(send())


IDS = Turn([97, 98, 99], 9)


@pytest.mark.parametrize("api", ["completions", "chat"])
@pytest.mark.parametrize(("model", "text"), [("plain", "x" * 9), ("nasty", "\N{GRINNING FACE}" * 2 + "x")])
def test_streams_are_read_and_their_tokens_counted_as_they_come(address, tokenizer, api, model, text):
    endpoint = Endpoint(address, model, api=api, tokenizer=tokenizer)
    said, record = ask(endpoint, IDS)
    assert said == text
    assert (record.code, record.error, record.tokens, record.told_tokens) == ("OK", "", 9, 9)
    assert record.prompt_tokens == 3
    assert [count for _, count in record.arrivals] == ([1] * 9 if model == "plain" else [4, 4, 1])
    times = [when for when, _ in record.arrivals]
    assert record.sent < times[0]
    assert times == sorted(times)
    assert times[-1] <= record.ended
    body = openai_double.received(address)[-1]
    assert (body["temperature"], body["max_tokens"], body["stream"], body["ignore_eos"]) == (0, 9, True, True)
    assert body.get("prompt", body.get("messages")) in ([97, 98, 99], [{"role": "user", "content": "abc"}])


async def test_a_text_is_timed_when_it_comes(address):
    record = Record(0, 0, 0.0, 0.0, expected_tokens=IDS.output_tokens)
    async with http_sender(Endpoint(address, "held")) as sender:
        asked = asyncio.create_task(sender.send(IDS, record))
        await until(lambda: bool(record.arrivals), seconds=openai_double.HELD_SECONDS)
        seen = time.monotonic()
        await asyncio.to_thread(openai_double.release, address)
        await asked
    assert record.error == ""
    assert record.arrivals[0][0] <= seen <= record.arrivals[1][0], "the others had not been sent"


def test_without_a_tokenizer_the_endpoint_counts(address):
    said, record = ask(Endpoint(address, "pairs"), IDS)
    assert said == "xyxyxyxyx"
    assert (record.tokens, record.told_tokens) == (9, 0)
    assert len(record.arrivals) == 5
    _, record = ask(Endpoint(address, "cached"), Turn("hello", 3))
    assert (record.prompt_tokens, record.cached_tokens) == (5, 4)
    said, record = ask(Endpoint(address, "reasoning", api="chat"), IDS_AS_TEXT)
    assert (said, record.tokens) == ("x" * 9, 9)


IDS_AS_TEXT = Turn([("system", "be brief"), ("user", "abc")], 9)


def test_an_answer_of_another_length_counts_as_such_and_is_kept(address):
    _, record = ask(Endpoint(address, "short"), IDS)
    assert (record.code, record.error, record.tokens) == ("OK", "", 7)
    summary = summarize([record])
    assert (summary.other_length, summary.failed, summary.ttft.count) == (1, {}, 1)


@pytest.mark.parametrize(
    ("model", "code", "sentence", "tokens"),
    [
        ("keyed", "HTTP_401", "Incorrect API key provided.; name the variable that holds its key", 0),
        ("absent", "HTTP_404", "The model `absent` does not exist.; look at --endpoint", 0),
        ("strict", "HTTP_400", "Unrecognized field: ignore_eos; if it does not know a field", 0),
        ("malformed", "MALFORMED", "a message is not JSON", 2),
        ("array", "MALFORMED", "not a JSON object", 2),
        ("no-choices", "MALFORMED", "has no choices", 2),
        ("midway", "STREAM_ERROR", "out of memory", 2),
        ("disconnect", "DISCONNECTED", "broke after 2 messages", 2),
        ("cut", "DISCONNECTED", "ended early, after 2 messages", 2),
        ("no-stream", "NOT_A_STREAM", "application/json", 0),
        ("silent", "NO_TEXT", "without any text", 0),
        ("no-usage", "NO_USAGE", "give --tokenizer", 9),
    ],
)
def test_a_failure_is_in_the_record(address, model, code, sentence, tokens):
    _, record = ask(Endpoint(address, model), IDS)
    assert record.code == code
    assert sentence in record.error
    assert record.tokens == tokens
    assert record.ended >= record.sent
    assert summarize([record]).failed == {code: 1}


def test_keys_extra_fields_and_streams_that_stay_open(address):
    assert ask(Endpoint(address, "keyed", key=openai_double.KEY), IDS)[1].error == ""
    assert ask(Endpoint(address, "strict", extra={}), IDS)[1].error == ""
    assert ask(Endpoint(address, "plain", extra={"max_tokens": 3}), IDS)[1].tokens == 3
    _, record = ask(Endpoint(address, "open"), IDS)
    assert record.error == ""
    # The stream, which is open still, is left a second after its last message.
    assert time.monotonic() - record.ended > 0.9, "it ended with its last message, not with its stream"
    openai_double.release(address)
    assert openai_double.KEY not in repr(Endpoint(address, "keyed", key=openai_double.KEY))


def test_a_connection_that_the_server_has_closed_is_no_failure(address, monkeypatch):
    """The pool does not know yet that it is closed."""
    monkeypatch.setattr("httpcore2._async.http11.AsyncHTTP11Connection.has_expired", lambda connection: False)

    async def send(count):
        found = [Record(0, 0, 0.0, 0.0, expected_tokens=9) for _ in range(count)]
        async with http_sender(Endpoint(address, "closing")) as sender:
            for record in found:
                await sender.send(IDS, record)
                await asyncio.sleep(0.05)
        return found

    for record in asyncio.run(send(3)):
        assert (record.code, record.tokens) == ("OK", 9)
        assert record.sent < record.arrivals[0][0] < record.sent + 30


def test_an_address_without_a_server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    _, record = ask(Endpoint(url, "plain"), IDS)
    assert record.code == "UNAVAILABLE"
    assert f"no server answers at {url}" in record.error
    with pytest.raises(EndpointError, match="no server answers"):
        examine.told(Endpoint(url, "plain"))


def test_refusals_come_before_the_run(address, tokenizer):
    assert examine.told(Endpoint(address, "plain")) == Known(0, openai_double.CONTEXT)
    assert examine.told(Endpoint(address, "pairs")) == Known(255, 77)
    assert examine.told(Endpoint(address, "short")) == Known()
    with pytest.raises(EndpointError, match=r"has no model 'absent'; name one .*: plain, nasty"):
        examine.told(Endpoint(address, "absent"))
    with pytest.raises(EndpointError, match="ignore_eos"):
        examine.try_out(Endpoint(address, "strict"), IDS, 30.0)
    for turn in (IDS, Turn("abc", 4)):
        examine.try_out(Endpoint(address, "plain", prompts="text", tokenizer=tokenizer), turn, 30.0)
        assert openai_double.received(address)[-1]["prompt"] == "abc"
    with pytest.raises(EndpointError, match="become text with --tokenizer"):
        examine.try_out(Endpoint(address, "plain", prompts="text"), IDS, 30.0)
    with pytest.raises(EndpointError, match="give --endpoint-api chat"):
        examine.try_out(Endpoint(address, "plain"), IDS_AS_TEXT, 30.0)


def test_client_processes_put_a_load_on_it(address, tokenizer):
    sessions = [Session(index, (Turn([97] * 5, 6),)) for index in range(12)]
    endpoint = Endpoint(address, "nasty", tokenizer=tokenizer)
    outcome = driver.run(endpoint, sessions, ClosedLoop(4), workers=2)
    assert {(record.tokens, record.code) for record in outcome.records} == {(6, "OK")}
    talk = [Session(0, (Turn([("user", "first")], 3), Turn([("user", "second")], 3)))]
    driver.run(Endpoint(address, "plain", api="chat"), talk, ClosedLoop(1), workers=1)
    assert [m["content"] for m in openai_double.received(address)[-1]["messages"]] == [
        "first",
        "xxx",
        "second",
    ]


def test_an_interrupt_stops_the_streams_and_keeps_their_tokens(address, tokenizer):
    caught = []

    def interrupt(progress):
        if progress.tokens and not caught:
            caught.append(progress)
            raise KeyboardInterrupt

    sessions = [Session(index, (Turn([97] * 5, 5000),)) for index in range(2)]
    endpoint = Endpoint(address, "plain", tokenizer=tokenizer)
    outcome = driver.run(endpoint, sessions, ClosedLoop(2), workers=1, listener=interrupt)
    assert outcome.interrupted
    assert {record.code for record in outcome.records} == {"CANCELLED"}
    assert all(0 < record.tokens < 5000 for record in outcome.records)


def test_counting(tokenizer, tmp_path):
    assert counter(tokenizer).count("a\N{GRINNING FACE}") == 5
    assert counter(tokenizer).per_part(["a", "", "\N{GRINNING FACE}b", "c"]) == [1, 0, 5, 1]
    assert counter(tokenizer).per_part([]) == []
    assert spread_evenly(9, 4) == [2, 2, 2, 3]
    assert spread_evenly(2, 5) == [0, 0, 1, 0, 1]
    with pytest.raises(EndpointError, match=r"has no tokenizer.json"):
        Counter(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(EndpointError, match="can't be read"):
        Counter(str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"url": "127.0.0.1:8000"}, "give an address like"),
        ({"url": "http://me:secret@host/v1"}, "kept in the document"),
        ({"model": None}, "needs --endpoint-model"),
        ({"name": "longspan"}, "is taken"),
        ({"api": "responses"}, "choose completions or chat"),
        ({"prompts": "words"}, "choose ids or text"),
        ({"extra": "{"}, "not JSON"),
        ({"extra": "[]"}, "JSON object"),
        ({"key_env": "LONGSPAN_NO_SUCH_KEY"}, "is not set"),
    ],
)
def test_options_that_make_no_sense(fields, sentence):
    good = {"url": "http://a/v1", "model": "m", "name": "peer", "api": "chat", "prompts": "ids"}
    with pytest.raises(LoadTestError, match=sentence):
        asked.endpoint(**{**good, "tokenizer": None, "extra": None, "key_env": None, **fields})


def test_which_targets_share_this_machine():
    assert Endpoint("http://localhost:1/v1", "m").local
    assert Endpoint("https://[::1]/v1", "m").port == 443
    assert Server(socket.gethostbyname("localhost"), 1).local
    assert not Endpoint("http://192.0.2.1:1/v1", "m").local, "an address of no machine"
    assert not Server("no-such-host.invalid", 1).local


def test_numbers_that_make_no_sense():
    assert asked.loads("1,8", None, 1.0) == [ClosedLoop(1), ClosedLoop(8)]
    assert [load.rate for load in asked.loads(None, "0.5,2", math.inf)] == [0.5, 2.0]
    for arguments in (("x", None, 1), ("1.5", None, 1), ("0", None, 1), ("1,1", None, 1), (None, "nan", 1)):
        with pytest.raises(LoadTestError, match=r"--(concurrency|rate)"):
            asked.loads(*arguments)


def test_the_command_with_only_an_endpoint(address, tokenizer, tmp_path):
    files = {kind: tmp_path / f"r.{kind}" for kind in ("json", "csv")}
    where = ["--endpoint-only", "--endpoint", address, "--endpoint-name", "double"]

    def run(*arguments):
        return CliRunner().invoke(application, ["load", *where, *arguments])

    done = run(
        *("--endpoint-model", "plain", "--tokenizer", tokenizer, "--requests", "8", "--concurrency", "2"),
        *("--prompt-tokens", "9", "--output-tokens", "6"),
        *("--json", str(files["json"]), "--csv", str(files["csv"])),
    )
    assert done.exit_code in (0, 1), done.output  # a busy machine may make the run invalid
    assert "2 users, 9/6, double" in done.stdout
    found = result.load(files["json"])
    (only,) = found.runs
    assert (only.summary.requests, only.summary.output_tokens, only.server, only.target) == (
        8,
        48,
        None,
        "double",
    )
    assert found.peers["double"]["endpoint"] == address
    assert json.loads(files["json"].read_text())["server"] == {}
    assert len(files["csv"].read_text().splitlines()) == 9
    for arguments, sentence in (
        (["--endpoint-model", "plain"], "give its --tokenizer"),
        (["--endpoint-model", "absent", "--tokenizer", tokenizer], "has no model 'absent'"),
        (["--endpoint-model", "plain", "--tokenizer", tokenizer, "--prompt-tokens", "300"], "context of 300"),
        (["--endpoint-model", "keyed", "--tokenizer", tokenizer], "--endpoint-key-env"),
    ):
        refused = run(*arguments)
        assert refused.exit_code == 1
        assert sentence in refused.stderr
