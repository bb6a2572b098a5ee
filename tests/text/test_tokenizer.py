"""The default model's tokenizer and chat template, beside transformers' own."""

import json
import shutil
import subprocess
import sys
import threading
import time
import weakref

import pytest

from server.errors import RefusedError
from server.panics import TokenizersError
from server.text.decoding import Decoding
from server.text.encode import token_ids
from server.text.encoder_texts import encoder_texts
from server.text.errors import TextError, TooManyTokensError
from server.text.tokenizer import Tokenizer
from tests.api.conftest import save_tokenizer

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is 東京? 🙂"},
    {"role": "assistant", "content": "In Japan."},
    {"role": "user", "content": "And 12345?"},
]


@pytest.mark.parametrize("text", ["", "a", " two  spaces", "12345", "東京🙂\n", "<|im_end|> spelled out"])
def test_texts_become_the_same_tokens_and_come_back(tokenizer, transformers_own, text):
    assert tokenizer.encode(text) == transformers_own(text)["input_ids"]
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@pytest.fixture
def strips_too_much(default_model, tmp_path):
    """A decoder of the library's, in which it has a bug with texts of one ``a``."""
    folder = tmp_path / "model"
    shutil.copytree(default_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.gguf"))
    said = json.loads((folder / "tokenizer.json").read_text())
    said["decoder"] = {"type": "Strip", "content": "a", "start": 3, "stop": 3}
    (folder / "tokenizer.json").write_text(json.dumps(said))
    return folder


def test_a_panic_of_the_library_is_an_error_like_others(strips_too_much):
    tokenizer = Tokenizer(strips_too_much)
    (token,) = tokenizer.encode("a")
    for decode in (tokenizer.decode, tokenizer.decode_aside, Decoding.read(strips_too_much).decode_known):
        with pytest.raises(TokenizersError, match="the tokenizers library failed: index out of bounds"):
            decode([token], skip_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode("b")) == "b"


def test_conversations_become_the_same_tokens(tokenizer, transformers_own):
    for conversation in (CONVERSATION, [{"role": "robot", "content": "x"}]):
        expected = transformers_own.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert tokenizer.encode_chat(conversation) == expected


def test_the_end_of_a_turn_is_an_end_of_sequence(tokenizer):
    assert tokenizer.encode("<|im_end|>") == [tokenizer.token_id(tokenizer.eos_token)]
    assert tokenizer.has_chat_template


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "chat.messages"),
        ([{"role": "", "content": "x"}], "chat.messages[0].role"),
        (
            [{"role": "user", "content": "fine"}, {"role": "user", "content": "\ud800"}],
            "chat.messages[1].content",
        ),
    ],
)
def test_bad_conversations_name_the_field_at_fault(tokenizer, messages, field):
    with pytest.raises(TextError) as caught:
        tokenizer.encode_chat(messages)
    assert caught.value.field == field


def test_ids_outside_the_vocabulary_are_refused(tokenizer):
    with pytest.raises(TextError, match="index 1"):
        tokenizer.decode([5, tokenizer.vocabulary_size])


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(RefusedError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_a_settings_file_that_cannot_be_read_is_named(tmp_path):
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(RefusedError, match=r"tokenizer_config\.json or a chat template can't be read: "):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "work",
    [
        lambda tokenizer: tokenizer.encode("hello world " * 40_000),
        lambda tokenizer: tokenizer.encode("hello world " * 40_000, special_tokens_as_text=True),
        lambda tokenizer: tokenizer.decode_aside([40] * 160_000, skip_special_tokens=True),
    ],
)
def test_other_threads_run_beside_long_texts(tokenizer, work):
    """With the interpreter's lock held, one client's text would stop every stream for seconds."""
    tokenizer.encode("", special_tokens_as_text=True)  # loads what it needs
    working = threading.Thread(target=work, args=[tokenizer])
    working.start()
    turns = 0
    while working.is_alive():
        turns += 1
        time.sleep(0.001)
    assert turns > 10


def test_it_needs_no_torch(default_model):
    code = (
        "import sys; from server.text.tokenizer import Tokenizer; from pathlib import Path;"
        f"Tokenizer(Path({str(default_model)!r})).encode_chat([{{'role': 'user', 'content': 'x'}}]);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize(
    "encode",
    [
        lambda backend: token_ids(backend, "a", add_special_tokens=False, most=2),
        lambda backend: encoder_texts(backend, ["a"], most=2, truncate=False),
    ],
)
def test_a_refusal_keeps_no_tokens(encode):
    """They are many: until the error's traceback is collected, each refusal would hold megabytes."""

    class Encoding(list):  # which, unlike a list, can be watched
        pass

    made = []

    class Backend:
        def encode_batch_fast(self, texts, *, add_special_tokens):
            encoding = Encoding("abc")
            made.append(weakref.ref(encoding))
            return [encoding]

        def num_special_tokens_to_add(self, pair):
            return 0

    with pytest.raises(TooManyTokensError) as caught:
        encode(Backend())
    assert caught.value.count == 3
    (encoding,) = made
    assert encoding() is None
