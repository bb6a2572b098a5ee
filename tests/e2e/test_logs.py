"""Nothing that a client writes is in the log, at any level, unless that is asked for."""

from collections import Counter

import pytest

from tests.e2e import hostile
from tests.e2e.hostile import Count, Detokenize, Generate, Tokenize
from tests.e2e.server import Server

SECRET = "xyzzy-4711"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
    "{% if 'fail' in messages[-1].content %}{{ raise_exception(messages[-1].content) }}{% endif %}"
)


def chat(content, role="user"):
    return {"messages": [{"role": role, "content": content}]}


MESSAGES = [
    ("Generate", Generate(text=SECRET, stop={"max_tokens": 3, "stop_strings": [SECRET]})),
    ("Generate", Generate(chat=chat(SECRET), stop={"max_tokens": 3})),
    ("Generate", Generate(chat=chat(f"fail {SECRET}"))),
    ("Generate", Generate(chat=chat("hello", role=SECRET), stop={"max_tokens": 3})),
    ("Generate", Generate(text=SECRET * 300)),
    ("Generate", Generate(text=SECRET, model=SECRET)),
    ("Generate", Generate(text=SECRET, request_id=f"{SECRET} is no name")),
    ("Generate", Generate(text=SECRET, stop={"stop_strings": [SECRET * 200, ""]})),
    ("Tokenize", Tokenize(text=SECRET, model=SECRET)),
    ("CountTokens", Count(chat=chat(f"fail {SECRET}"))),
    ("Detokenize", Detokenize(token_ids=[2**32 - 1], model=SECRET)),
]
TORN = b"\x12\x0a" + SECRET.encode() + b"\xff\xff"


@pytest.mark.parametrize("texts", [False, pytest.param(True, marks=pytest.mark.stress)])
def test_no_text_of_a_client_is_in_the_log(texts, tiny_packed, tmp_path):
    template = tmp_path / "failing.jinja"
    template.write_text(TEMPLATE)
    flags = ("--log-level", "debug", "--chat-template", template, *(["--log-texts"] if texts else []))
    with Server(*tiny_packed, *flags) as server:
        sent = [(method, message.SerializeToString()) for method, message in MESSAGES] + [("Generate", TORN)]
        answers: Counter[str] = Counter()
        for method, payload in sent:
            answers += hostile.send(server.address, method, payload, clients=1, times=1)
        log = server.log
    assert answers["OK"] >= 2
    refused = answers.total() - answers["OK"]
    assert log.count(": INVALID_ARGUMENT: ") + log.count(": NOT_FOUND: ") == refused >= 8
    assert (SECRET in log) == texts
