"""Conversations under templates of every shape, beside transformers' own rendering of them.

The expected prompt is what transformers renders of messages whose contents are passed, by hand, in the form
that the template was written for.
"""

import logging
import re

import pytest
from transformers import AutoTokenizer

from server.api import errors
from server.errors import RefusedError
from server.text.errors import TextError
from server.text.tokenizer import Tokenizer
from tests.api.conftest import save_tokenizer

EACH = "{% for m in messages %}"
END = "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
CHATML = EACH + "<{{ m['role'] }}>{{ m['content'] }}\n" + END
FIRST_PART = EACH + "<{{ m.role }}>{{ m['content'][0]['text'] }}\n" + END
PARTS = (
    EACH
    + "<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    + END
)
SELECTED = (
    EACH + "{{ m.role|upper }}: {% for p in m.content|selectattr('type', 'equalto', 'text') %}{{ p['text'] }}"
    "{% endfor %}{% generation %}{% endgeneration %}\n" + END
)
EITHER = (
    EACH
    + "<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
    + END
)
SYSTEM_APART = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content.strip() }}\n"
    "{% set messages = messages[1:] %}{% endif %}"
    + EACH
    + "<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}"
    + END
)
ALTERNATING = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    + EACH
    + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}{% endif %}"
    "<{{ 'model' if m.role == 'assistant' else m.role }}>{{ m.content | trim }}\n" + END
)
JSON = "{{ messages | tojson }}"
FEW_ROLES = (
    EACH
    + "{% if m.role == 'user' %}Q: {{ m.content }}{% endif %}"
    + "{% if m.role == 'assistant' %}A: {{ m.content }}{% endif %}"
    + END
)
ONE_OF_TWO = EACH + "{% if m.role == 'user' %}Q: {{ m.content }}{% else %}A: {{ m.content }}{% endif %}" + END
LOUD = EACH + "{{ m.role | capitalize }}: {{ m.content | upper }}" + END
LAST = "Q: {{ messages[-1].content }}"
NESTED = "{% for i in [1] %}" * 30 + "{{ messages[0].content }}" + "{% endfor %}" * 30
CONTINUE = (
    EACH + "{% if m.role == 'note' %}{% continue %}{% endif %}{{ m.content }}{{ strftime_now('%Y') }}" + END
)

USER = [("user", " Where is it? ")]
SYSTEM = [("system", "Be <brief>."), ("user", "Where?")]
TURNS = [("user", "One"), ("assistant", " Two "), ("user", "Three\n")]


@pytest.fixture
def load(tmp_path):
    def load(template, **options):
        save_tokenizer(tmp_path, template)
        return Tokenizer(tmp_path, **options)

    return load


def ours(tokenizer, turns):
    ids = tokenizer.encode_chat([{"role": role, "content": content} for role, content in turns])
    return tokenizer.decode(ids, skip_special_tokens=False)


def theirs(folder, turns, as_parts=()):
    messages = [
        {"role": role, "content": [{"type": "text", "text": content}] if role in as_parts else content}
        for role, content in turns
    ]
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )


EVERYBODY = ("system", "user", "assistant", "tool")


@pytest.mark.parametrize(
    ("template", "as_parts", "conversations"),
    [
        (CHATML, (), (USER, SYSTEM, TURNS, [("tool", "42"), ("user", "x")])),
        (FIRST_PART, EVERYBODY, (USER, SYSTEM, TURNS, [("tool", "42"), ("user", "x")])),
        (PARTS, EVERYBODY, (USER, SYSTEM, TURNS)),
        (SELECTED, EVERYBODY, (USER, SYSTEM, TURNS)),
        (EITHER, (), (USER, SYSTEM, TURNS)),
        (SYSTEM_APART, ("user", "assistant"), (USER, SYSTEM, TURNS)),
        (ALTERNATING, (), (USER, TURNS)),
        (JSON, (), (USER, SYSTEM, TURNS)),
        (LOUD, (), (USER, SYSTEM, TURNS)),
        (FEW_ROLES, (), (USER, TURNS)),
        (CONTINUE, (), (USER, SYSTEM, TURNS)),
    ],
)
def test_prompts_are_those_of_transformers(load, tmp_path, template, as_parts, conversations):
    tokenizer = load(template)
    assert tokenizer.has_chat_template
    for turns in conversations:
        assert ours(tokenizer, turns) == theirs(tmp_path, turns, as_parts)


@pytest.mark.parametrize(
    ("template", "turns", "field", "sentence"),
    [
        (FEW_ROLES, SYSTEM, "chat.messages[0]", "leaves a message of role 'system' in this place out"),
        (FEW_ROLES, [*USER, ("tool", "42")], "chat.messages[1]", "leaves a message of role 'tool'"),
        (LAST, TURNS, "chat.messages[0]", "send fewer messages"),
        (CONTINUE, [("user", "x"), ("note", "y")], "chat.messages[1]", "of role 'note'"),
        (ALTERNATING, SYSTEM, "chat.messages", "no system here"),
        (ALTERNATING, [*USER, *USER], "chat.messages", "take turns"),
    ],
)
def test_what_would_be_left_out_is_refused(load, template, turns, field, sentence):
    with pytest.raises(TextError, match=sentence.replace("[", r"\[")) as caught:
        ours(load(template), turns)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("template", "role", "known"),
    [
        (CHATML, "control", True),
        (FIRST_PART, "ipython", True),
        (LOUD, "documents", True),
        (JSON, "developer", True),
        (ONE_OF_TWO, "system", True),  # what it makes of it is transformers' meaning
        (ONE_OF_TWO, "wizard", False),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "tool", False),
        (
            EACH + "{% if m.role == 'function' %}F{% else %}T{% endif %}{{ m.content }}" + END,
            "function",
            True,
        ),
    ],
)
def test_roles_are_those_that_change_the_prompt(load, tmp_path, template, role, known):
    tokenizer = load(template)
    turns = [("user", "x"), (role, "y")]
    if known:
        as_parts = (*EVERYBODY, role) if template == FIRST_PART else ()
        assert ours(tokenizer, turns) == theirs(tmp_path, turns, as_parts)
        return
    with pytest.raises(TextError, match=f"no role '{role}'") as caught:
        ours(tokenizer, turns)
    assert caught.value.field == "chat.messages[1].role"


@pytest.mark.parametrize(
    ("template", "role"),
    [
        (FEW_ROLES, "🙂" * 10_000),
        (ONE_OF_TWO, "🙂" * 10_000),
        (
            "{% if messages|length > 1 %}{{ raise_exception(messages[1].role) }}{% endif %}" + CHATML,
            "🙂" * 10_000,
        ),
    ],
)
def test_what_a_client_sent_is_quoted_in_part(load, template, role):
    with pytest.raises(TextError) as caught:
        ours(load(template), [("user", "x"), (role, "y")])
    status = errors.invalid([errors.Violation(caught.value.field, str(caught.value))]).status()
    size = sum(len(key) + len(value) for key, value in status.trailing_metadata)
    assert size + 3 * len(status.details.encode()) < 8000


def test_a_conversation_may_have_a_few_unusual_roles(load):
    tokenizer = load(CHATML)
    assert "<r15>" in ours(tokenizer, [(f"r{index}", "x") for index in range(16)])
    with pytest.raises(TextError, match="may have 16"):
        ours(tokenizer, [(f"r{index}", "x") for index in range(17)])


def test_a_template_that_takes_only_some_contents_is_still_used(load):
    template = (
        "{% for m in messages %}{% if m.content not in 'yes no' %}{{ raise_exception('say yes') }}{% endif %}"
    )
    tokenizer = load(
        "{% if messages|length > 1 %}"
        + template
        + "{{ m.content }}{% endfor %}{% else %}{{ messages[0].content }}{% endif %}"
    )
    assert ours(tokenizer, [("user", "yes"), ("user", "no")]) == "yesno"
    with pytest.raises(TextError, match="say yes"):
        ours(tokenizer, [("user", "yes"), ("user", "perhaps")])


def test_contents_are_looked_for_where_the_template_takes_no_words_of_ours(load):
    template = (
        "{% if messages|length > 1 and messages[0].content != 'yes' %}"
        "{{ raise_exception('say yes') }}{% endif %}{{ messages[0].content }}"
    )
    with pytest.raises(TextError, match="leaves it out of the prompt") as caught:
        ours(load(template), [("user", "yes"), ("user", "no")])
    assert caught.value.field == "chat.messages[1].content"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("Hello!", "leaves what the user says out of the prompt"),
        (EACH + "{{ m.content[0].image }}" + END, "leaves what the user says out of the prompt"),
        ("{{ messages[0].a.b }}", "fails on a plain question: .* has no attribute 'a'"),
        ("{{ raise_exception('not today') }}", "fails on a plain question: not today"),
        (
            "{% for m in messages %}\n{{ m.content }\n",
            r"error in line 2 of chat_template\.jinja: unexpected '}'$",
        ),
        ("\n\n{{ messages | shout }}", r"error in line 3 of chat_template\.jinja: No filter named 'shout'$"),
        (NESTED, "fails on a plain question: too many statically nested blocks"),
        (
            "{{ 'a' * 10 ** 18 }}{{ messages[0].content }}",
            "fails on a plain question: it needs too much memory",
        ),
        ("{{ '\\ud800' }}{{ messages[0].content }}", "fails on a plain question: .* surrogates not allowed"),
        # As a list, the content is printed as Python or JSON writes it.
        (EACH + "{{ m.content[:2] }}" + END, "leaves what the user says out of the prompt"),
        (EACH + "{{ m.content[:2] | tojson }}" + END, "leaves what the user says out of the prompt"),
    ],
)
def test_a_template_of_no_use_is_said_at_the_start(load, caplog, template, reason):
    tokenizer = load(template)
    assert not tokenizer.has_chat_template
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "conversations are refused" in record.getMessage()
    assert re.search(reason, record.getMessage())
    assert re.search(reason, tokenizer.chat_refusal)
    with pytest.raises(TextError, match=reason.rstrip("$")) as caught:
        ours(tokenizer, USER)
    assert caught.value.field == "chat"
    assert tokenizer.encode("text") == list(b"text")


def test_what_a_template_leaves_out_is_said_at_the_start(load, caplog):
    caplog.set_level(logging.INFO)
    load(ALTERNATING)
    assert "system messages are refused: no system here" in caplog.text
    load(LAST)
    assert (
        "conversations of several turns are refused, since the template leaves some of them out"
        in caplog.text
    )
    load(PARTS)
    assert "lists of parts" in caplog.text


def test_a_template_that_was_asked_for_must_work(load, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }")
    with pytest.raises(RefusedError, match=r"--chat-template: the model has .* line 1 of .*mine\.jinja"):
        load(CHATML, chat_template=str(file))
