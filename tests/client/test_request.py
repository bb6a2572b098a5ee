from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan import GenerateOptions, InvalidRequestError
from longspan.encoding import build_embed, build_score
from longspan.request import build_detokenize, build_request
from longspan.v1.inference_pb2 import GenerateRequest
from longspan.v1.types_pb2 import ChatMessage


def test_every_field_of_the_proto_has_an_option() -> None:
    def paths(message: Any, prefix: str = "") -> set[str]:
        found = set()
        for field in message.DESCRIPTOR.fields:
            if field.containing_oneof is not None and field.containing_oneof.name == "prompt":
                continue
            if field.message_type is not None and not field.message_type.GetOptions().map_entry:
                found |= paths(getattr(message, field.name), f"{prefix}{field.name}.")
            else:
                found.add(prefix + field.name)
        return found

    values: dict[str, Any] = {
        "logit_bias": {1: 1.0},
        "stop": ["x"],
        "stop_token_ids": [1],
        "forced_token_ids": [1],
    }
    built: set[str] = set()
    for option, kind in GenerateOptions.__annotations__.items():
        value = values.get(option, "x" if "str" in str(kind) else 1)
        request = build_request("p", {option: value})
        request.ClearField("text")
        [(group, inner)] = request.ListFields()
        leaf = (
            [f"{group.name}.{field.name}" for field, _ in inner.ListFields()]
            if group.message_type
            else [group.name]
        )
        built |= set(leaf)
    assert built == paths(GenerateRequest())


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text(text: str) -> None:
    request = build_request(text, {})
    assert GenerateRequest.FromString(request.SerializeToString()).text == text


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1))
def test_any_token_ids(ids: list[int]) -> None:
    request = build_request(ids, {})
    assert request.WhichOneof("prompt") == "token_ids"
    assert list(request.token_ids.ids) == ids


def test_all_forms_of_messages() -> None:
    forms: list[Any] = [
        {"role": "user", "content": "Hi"},
        ("user", "Hi"),
        ChatMessage(role="user", content="Hi"),
    ]
    request = build_request(forms, {})
    assert list(request.chat.messages) == [ChatMessage(role="user", content="Hi")] * 3


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"top_k": -1}, "sampling.top_k"),
        ({"temperature": "hot"}, "sampling.temperature"),
        ({"seed": 2**64}, "sampling.seed"),
        ({"logit_bias": {"a": 1.0}}, "sampling.logit_bias"),
        ({"max_tokens": 1.5}, "stop.max_tokens"),
        ({"stop": [1]}, "stop.stop_strings"),
        ({"stop_token_ids": [-1]}, "stop.stop_token_ids"),
        ({"stop_token_ids": 7}, "stop.stop_token_ids"),
        ({"forced_token_ids": "ab"}, "forced_token_ids"),
        ({"forced_token_ids": [-1]}, "forced_token_ids"),
        ({"logprobs": -1}, "logprobs.output"),
        ({"prompt_logprobs": [1]}, "logprobs.prompt"),
        ({"n": "two"}, "n"),
        ({"request_id": "\ud800"}, "request_id"),
    ],
)
def test_what_does_not_fit_its_field_is_named(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError, match="does not fit") as raised:
        build_request("hi", options)
    (violation,) = raised.value.violations
    assert violation.field == field


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("\ud800", "text"),
        ([1, -1], "token_ids.ids"),
        ([1, "a"], "token_ids.ids"),
        ([], "prompt"),
        ([("user\udcff", "Hi")], "chat.messages[0].role"),
        ([("user", "Hi"), {"role": "user", "content": 5}], "chat.messages[1].content"),
    ],
)
def test_a_prompt_that_does_not_fit_is_named(prompt: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        build_request(prompt, {})
    assert raised.value.violations[0].field == field


@pytest.mark.parametrize(
    ("prompt", "options", "sentence"),
    [
        (5, {}, "a prompt is text, token ids or messages, not int"),
        (b"bytes", {}, "not bytes"),
        (bytearray(b"bytes"), {}, "not bytearray"),
        ({"role": "user", "content": "Hi"}, {}, "not dict"),
        ([{"role": "user"}], {}, r"chat.messages\[0\]: a message is a role and a content"),
        ([{"role": "user", "content": "Hi", "name": "Ann"}], {}, "not {'role': 'user', .*'name': 'Ann'}"),
        ([("user", "Hi", "there")], {}, "a message is a role and a content"),
        ([("user", "Hi"), 5], {}, r"chat.messages\[1\]: a message is a role and a content, not 5"),
        ("hi", {"temprature": 1.0}, "there is no option 'temprature'"),
    ],
)
def test_mistakes_in_the_call_are_type_errors(prompt: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        build_request(prompt, options)


@pytest.mark.parametrize("texts", [b"x", bytearray(b"x"), memoryview(b"x"), {"a": 1}, 5])
def test_texts_and_inputs_are_lists(texts: Any) -> None:
    with pytest.raises(TypeError, match=f"not {type(texts).__name__}"):
        build_embed(texts, {})
    with pytest.raises(TypeError, match=f"not {type(texts).__name__}"):
        build_score(texts, {})


def test_one_text_is_no_list_of_its_characters() -> None:
    assert build_embed("ab", {}).texts == ["ab"]
    with pytest.raises(TypeError, match="a list of texts, or of pairs of texts, not str"):
        build_score("ab", {})


@pytest.mark.parametrize(
    ("texts", "field"),
    [
        ([b"x"], "texts[0]"),
        ([[1], b"x"], "texts[1]"),
        ([{1: 2}], "texts[0]"),
        (["a", [1]], "texts[0]"),
        ([[1], "a"], "texts[1]"),
        ([1, 2], "texts[0]"),
        (["a", "\ud800"], "texts[1]"),
    ],
)
def test_a_text_that_is_none_is_named(texts: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError, match="is not a text") as raised:
        build_embed(texts, {})
    assert raised.value.violations[0].field == field


@pytest.mark.parametrize("one", [b"xy", {"text": "a", "pair": "b"}, ("a", 5), ("a", "b", "c"), 7])
def test_an_input_that_is_neither_text_nor_pair_is_named(one: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"inputs\[1\]: .* is not a text or a pair of texts"):
        build_score(["a", one], {})


@pytest.mark.parametrize("pooling", ["max", "MEAN", "unspecified", 1])
def test_pooling_names_its_choices(pooling: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"pooling: .* one of mean, cls, last, none"):
        build_embed("a", {"pooling": pooling})


@pytest.mark.parametrize("ids", [b"ab", bytearray(b"ab"), {1: 2}, "ab", [-1]])
def test_ids_to_detokenize_are_a_list_of_ids(ids: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"token_ids: .* does not fit"):
        build_detokenize(ids, "", keep_special_tokens=False)
