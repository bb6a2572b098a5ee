"""Which chat template is used, beside what transformers takes from the same folder."""

import json

import pytest
from transformers import AutoTokenizer

from server.errors import RefusedError
from server.text.tokenizer import Tokenizer
from tests.api.conftest import save_tokenizer


def template(name):
    return name + ":{{ messages[0].content }}"


def config(folder, value):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": value}))


def named(*names):
    return [{"name": name, "template": template(name)} for name in names]


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def folder(tmp_path):
    return save_tokenizer(tmp_path, template=None)


def used(folder, asked=None):
    tokenizer = Tokenizer(folder, asked)
    ids = tokenizer.encode_chat([{"role": "user", "content": "x"}])
    return tokenizer.decode(ids)


IN_CONFIG = template("config")
JINJA = {"chat_template.jinja": template("jinja")}
ADDITIONAL = {"additional_chat_templates/tool_use.jinja": template("tool_use")}
LEGACY = {"chat_template.json": json.dumps({"chat_template": template("legacy")})}


@pytest.mark.parametrize(
    ("value", "files"),
    [
        (IN_CONFIG, {}),
        (None, JINJA),
        (IN_CONFIG, JINJA),
        (named("tool_use", "default"), {}),
        (named("default", "rag"), JINJA),
        (None, JINJA | ADDITIONAL),
        (IN_CONFIG, LEGACY),
        (None, JINJA | LEGACY),
    ],
)
def test_the_same_as_transformers_takes(folder, value, files):
    config(folder, value)
    write(folder, files)
    own = AutoTokenizer.from_pretrained(folder)
    assert used(folder) == own.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


@pytest.mark.parametrize(
    ("value", "files", "expected"),
    [
        (named("tool_use"), {}, "tool_use:x"),
        (None, ADDITIONAL, "tool_use:x"),
        (None, LEGACY, "legacy:x"),
        (
            None,
            {"processor_config.json": json.dumps({"chat_template": template("processor")})},
            "processor:x",
        ),
        (None, {"processor_config.json": "{}"} | LEGACY, "legacy:x"),
        (None, {"chat_template.json": json.dumps({"chat_template": named("rag", "default")})}, "default:x"),
    ],
)
def test_found_where_transformers_tokenizers_have_none_by_default(folder, value, files, expected):
    config(folder, value)
    write(folder, files)
    assert used(folder) == expected


@pytest.mark.parametrize(
    ("value", "files", "reason"),
    [
        (None, {}, "has no chat template"),
        ([], {}, "has no chat template"),
        (
            named("tool_use", "rag"),
            {},
            "named rag, tool_use, of which none is the default.*--chat-template NAME",
        ),
        ({"default": 5}, {}, "in tokenizer_config.json that is no text"),
        (None, {"chat_template.json": "{"}, "has a chat_template.json that can't be read: Expecting"),
        (None, {"chat_template.json": "[]"}, "has a chat_template.json that can't be read"),
        (None, {"chat_template.json": '{"chat_template": 5}'}, "in chat_template.json that is no text"),
        (IN_CONFIG + "{%", {}, "error in line 1 of tokenizer_config.json"),
    ],
)
def test_no_template_has_a_reason(folder, value, files, reason):
    config(folder, value)
    write(folder, files)
    tokenizer = Tokenizer(folder)
    assert not tokenizer.has_chat_template
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(tokenizer.chat_refusal)


def test_no_template_at_all_is_not_worth_a_warning(folder, caplog):
    Tokenizer(folder)
    assert not caplog.records


def test_the_operator_may_choose(folder, tmp_path):
    config(folder, named("default", "rag"))
    assert used(folder, "rag") == "rag:x"
    file = tmp_path / "mine.jinja"
    file.write_text(template("mine"))
    assert used(folder, str(file)) == "mine:x"


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("rug", r"rug is neither the name of one of the model's templates \(default, rag\) nor a file"),
        (".", "nor a file that can be read .Is a directory"),
    ],
)
def test_a_choice_that_is_not_there_is_refused(folder, asked, reason):
    config(folder, named("default", "rag"))
    with pytest.raises(RefusedError, match=reason):
        Tokenizer(folder, asked)
