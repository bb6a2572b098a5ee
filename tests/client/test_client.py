from __future__ import annotations

import math
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

import longspan
from longspan import BusyError, CancelledError, Client, DeadlineError, FinishReason, UnavailableError
from tests.scripted import Running, serving


def test_generate(client: Client) -> None:
    answer = client.generate("abc", request_id="mine")
    assert (answer.text, answer.request_id, answer.model) == ("cba", "mine", "mirror")
    assert answer.token_ids == [ord(c) for c in "cba"]
    assert answer.finish_reason is FinishReason.STOP
    assert answer.completions[0].matched_stop == 2
    assert (
        answer.usage.prompt_tokens,
        answer.usage.cached_prompt_tokens,
        answer.usage.completion_tokens,
    ) == (3, 1, 3)
    assert answer.timings.time_to_first_token_seconds == 0.25


def test_every_option_arrives(client: Client, server: Running) -> None:
    answer = client.generate(
        [104, 105],
        model="mirror",
        temperature=0.5,
        top_k=5,
        top_p=0.75,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.125,
        logit_bias={7: -100.0},
        seed=2**64 - 1,
        n=2,
        max_tokens=1,
        min_tokens=0,
        stop="x",
        stop_token_ids=[3, 4],
        ignore_eos=True,
        include_stop_string=True,
        logprobs=0,
        prompt_logprobs=1,
        priority=-3,
        keep_special_tokens=True,
        forced_token_ids=[5, 6, 5],
    )
    (request,) = server.service.requests
    sampling, stop = request.sampling, request.stop
    assert list(request.token_ids.ids) == [104, 105]
    assert (request.model, request.n, request.priority, request.keep_special_tokens) == (
        "mirror",
        2,
        -3,
        True,
    )
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 5, 0.75, 0.25)
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    assert penalties == (1.5, -0.5, 0.125)
    assert dict(sampling.logit_bias) == {7: -100.0}
    assert sampling.seed == 2**64 - 1
    assert (stop.max_tokens, stop.min_tokens, stop.HasField("min_tokens")) == (1, 0, True)
    assert (list(stop.stop_strings), list(stop.stop_token_ids)) == (["x"], [3, 4])
    assert (stop.ignore_eos, stop.include_stop_string) == (True, True)
    assert list(request.forced_token_ids) == [5, 6, 5]
    assert (request.logprobs.HasField("output"), request.logprobs.output, request.logprobs.prompt) == (
        True,
        0,
        1,
    )
    assert [completion.index for completion in answer.completions] == [0, 1]
    assert answer.finish_reason is FinishReason.LENGTH
    assert answer.completions[0].matched_stop is None
    assert math.isclose(answer.completions[1].logprobs[0].chosen.logprob, -0.5)
    assert len(answer.prompt_logprobs) == 1


def test_what_is_not_given_stays_unset(client: Client, server: Running) -> None:
    client.generate("a", temperature=None)  # type: ignore[arg-type]
    (request,) = server.service.requests
    assert not request.HasField("sampling")
    assert not request.HasField("stop")
    assert not request.HasField("n")


def test_stream(client: Client) -> None:
    stream = client.stream("hello", stop=["!", "?"], logprobs=1, prompt_logprobs=0)
    deltas = list(stream)
    assert "".join(delta.text for delta in deltas) == "olleh"
    assert [delta.token_ids for delta in deltas] == [[ord(c)] for c in "olleh"]
    assert all(len(delta.logprobs) == 1 for delta in deltas)
    assert [delta.finish_reason for delta in deltas] == [None] * 4 + [FinishReason.STOP]
    assert deltas[-1].matched_stop == "!"
    assert (stream.request_id, stream.model) == ("r1", "mirror")
    assert (stream.prompt_tokens, stream.cached_prompt_tokens) == (5, 1)
    assert len(stream.prompt_logprobs) == 4
    assert stream.finish_reason is FinishReason.STOP
    assert stream.usage is not None
    assert stream.usage.completion_tokens == 5
    assert stream.timings is not None
    assert stream.timings.decode_seconds == 1.0


def test_stream_of_several_samples(client: Client) -> None:
    texts = ["", "", ""]
    for delta in client.stream("xyz", n=3):
        texts[delta.index] += delta.text
    assert texts == ["zyx"] * 3


def test_nothing_is_known_before_the_end(client: Client) -> None:
    with client.stream("!forever") as stream:
        assert next(iter(stream)).text == "on "
        assert stream.request_id == "r1"
        assert stream.usage is None
        assert stream.finish_reason is None


def test_break_cancels_on_the_server(client: Client, server: Running) -> None:
    stream = client.stream("!forever")  # the variable outlives the loop
    for _ in stream:
        break
    assert server.service.ended.acquire(timeout=5)
    with pytest.raises(CancelledError):
        list(stream)


def test_an_exception_in_the_loop_cancels_on_the_server(client: Client, server: Running) -> None:
    stream = client.stream("!forever")

    def fail_at_the_first() -> None:
        for _ in stream:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_at_the_first()
    assert server.service.ended.acquire(timeout=5)


def test_with_cancels_on_the_server(client: Client, server: Running) -> None:
    with client.stream("!forever") as stream:
        iterator = iter(stream)
        next(iterator)
    assert server.service.ended.acquire(timeout=5)


def test_close_from_another_thread_ends_the_loop(client: Client, server: Running) -> None:
    stream = client.stream("!forever")
    closer = threading.Thread(target=lambda: (server.service.forever.acquire(timeout=5), stream.close()))
    closer.start()
    with pytest.raises(CancelledError):
        list(stream)
    closer.join()
    assert server.service.ended.acquire(timeout=5)


def test_closing_a_finished_stream_changes_nothing(client: Client) -> None:
    stream = client.stream("ab")
    list(stream)
    stream.close()
    assert stream.finish_reason is FinishReason.STOP


def test_interrupting_a_unary_call_cancels_on_the_server(server: Running) -> None:
    code = (
        "from longspan import Client\n"
        "try:\n"
        f"    Client(port={server.port}).generate('!forever')\n"
        "except KeyboardInterrupt:\n"
        "    import time; print('interrupted', flush=True); time.sleep(10)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert server.service.forever.acquire(timeout=20)
            time.sleep(0.3)  # the server is faster than gRPC's way back from sending the request
            process.send_signal(signal.SIGINT)
            assert process.stdout is not None
            assert process.stdout.readline() == "interrupted\n"
            assert server.service.ended.acquire(timeout=5)  # while that process still lives
        finally:
            process.kill()


@pytest.mark.parametrize(
    "call", [Client.generate, lambda *args, **options: list(Client.stream(*args, **options))]
)
def test_a_timeout_is_the_deadline_on_the_server(client: Client, server: Running, call: Any) -> None:
    with pytest.raises(DeadlineError, match="did not answer in time") as raised:
        call(client, "!forever", timeout=0.2)
    assert isinstance(raised.value, TimeoutError)
    assert server.service.ended.acquire(timeout=5)


def test_chat(client: Client, server: Running) -> None:
    conversation = [{"role": "system", "content": "Be brief."}, ("user", "Hi")]
    client.generate(conversation)  # type: ignore[arg-type]
    turns = [(message.role, message.content) for message in server.service.requests[0].chat.messages]
    assert turns == [("system", "Be brief."), ("user", "Hi")]


def test_tokenize_count_and_back(client: Client) -> None:
    tokens = client.tokenize("hey")
    assert list(tokens.tokens) == ["<s>", "h", "e", "y"]
    assert list(client.tokenize([("user", "hey")], special_tokens=False).token_ids) == [104, 101, 121]
    assert client.detokenize([1, 104, 105]) == "hi"
    assert client.detokenize([1, 104, 105], keep_special_tokens=True) == "\x01hi"
    count = client.count_tokens([("user", "hey")])
    assert (count.token_count, count.context_length) == (3, 4096)


def test_special_tokens_as_text(client: Client, server: Running) -> None:
    client.tokenize("hey", special_tokens_as_text=True)
    client.count_tokens("hey", special_tokens_as_text=True)
    client.generate("hey", special_tokens_as_text=True)
    assert [request.special_tokens_as_text for request in server.service.requests] == [True] * 3


def test_models_and_server(client: Client) -> None:
    assert client.models() == ["mirror"]
    assert client.model_info().limits.n == 16
    assert client.server_info().load.running == 7
    assert client.abort("running")
    assert not client.abort("gone")
    with pytest.raises(longspan.NotFoundError):
        client.model_info("gpt-9")


def test_an_answer_beyond_the_default_message_size(client: Client) -> None:
    prompt = "\N{SLIGHTLY SMILING FACE}" * 100_000  # 45 bytes each
    answer = client.generate(prompt, logprobs=1)
    assert len(answer.text) == 100_000
    assert len(answer.completions[0].logprobs) == 100_000


def test_one_client_serves_many_threads(client: Client) -> None:
    answers: dict[int, str] = {}

    def ask(index: int) -> None:
        answers[index] = "".join(delta.text for delta in client.stream(f"prompt {index}"))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {index: f"prompt {index}"[::-1] for index in range(16)}


def test_health(client: Client, server: Running) -> None:
    assert client.health()
    server.set_ready(False)
    assert not client.health()
    with pytest.raises(UnavailableError, match=r"Not ready within 0.3 s. .* up but not ready"):
        client.wait_until_ready(0.3)
    threading.Timer(0.3, server.set_ready, [True]).start()
    client.wait_until_ready(10)


def test_waiting_for_a_server_that_starts_late() -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    with Client(port=port) as client:
        with pytest.raises(UnavailableError, match=f"No server answers at 127.0.0.1:{port}"):
            client.health(timeout=5)
        started = time.monotonic()
        late = threading.Event()

        def start() -> None:
            time.sleep(0.5)
            with serving(port):
                late.wait(20)

        thread = threading.Thread(target=start)
        thread.start()
        try:
            client.wait_until_ready(15)
        finally:
            late.set()
            thread.join()
        assert time.monotonic() - started < 10


def test_busy_tells_when_to_come_back(client: Client) -> None:
    with pytest.raises(BusyError) as raised:
        list(client.stream("!busy"))
    assert (raised.value.reason, raised.value.metadata, raised.value.retry_after) == (
        "QUEUE_FULL",
        {"limit": "4"},
        2.5,
    )
