"""Requests from keyword arguments. Options that are left out stay unset, and the server's defaults apply."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypedDict

from google.protobuf.message import Message as ProtoMessage

from longspan.errors import InvalidRequestError, Violation
from longspan.v1 import inference_pb2, types_pb2

Message = types_pb2.ChatMessage | Mapping[str, str] | tuple[str, str]
"""One turn of a conversation: ``{"role": "user", "content": "Hi"}`` or ``("user", "Hi")``."""

Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or a conversation for the model's chat template."""


NO_LISTS = (bytes, bytearray, memoryview, Mapping)
"""Types that can be iterated, but are no lists: bytes would be taken for token ids, keys for texts."""


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of ``generate`` and ``stream``; ranges and defaults are in ``types.proto``.

    Sampling that is left out is the model's own, see ``default_sampling`` of ``Client.model_info``.

    Attributes:
        model: its name; the server's only model if left out.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keeps the k most likely tokens.
        top_p: keeps the smallest set of tokens whose probabilities sum to at least this.
        min_p: drops tokens less likely than this share of the most likely one's probability.
        repetition_penalty: weakens tokens seen in prompt or output; 1 is none.
        presence_penalty: subtracted from the logits of tokens that the output has.
        frequency_penalty: the same for each time the output has them.
        logit_bias: added to logits, by token id.
        seed: the same request with the same seed gives the same tokens.
        n: independent samples of the prompt.
        max_tokens: the most tokens to generate.
        min_tokens: no end before this many tokens.
        stop: one or more strings; generation ends before the first of them.
        stop_token_ids: generation ends at any of these tokens.
        ignore_eos: the model's end-of-sequence tokens don't end generation.
        include_stop_string: the text includes the stop string that ended it.
        logprobs: log probabilities of each generated token and of this many most likely ones.
        prompt_logprobs: the same for the prompt's tokens after the first.
        priority: higher is served sooner.
        request_id: a name of your own, for ``abort`` and logs.
        keep_special_tokens: special tokens appear in the text.
        special_tokens_as_text: special tokens that the prompt's text or messages spell out stay text.
        forced_token_ids: the output begins with these tokens, not with sampled ones; ``logprobs``
            tells how likely the model found them.
        source_language: of the prompt, for an encoder-decoder with tokens for languages.
        target_language: of the output, likewise.
        no_repeat_ngram_size: no run of so many tokens comes twice.
        num_beams: beam search in place of sampling, with so many beams.
        length_penalty: its finished beams' scores are divided by their length to this power.
        early_stopping: when it ends, a value of ``EarlyStopping`` in ``inference.proto``.
    """

    model: str
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    n: int
    max_tokens: int
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop_string: bool
    logprobs: int
    prompt_logprobs: int
    priority: int
    request_id: str
    keep_special_tokens: bool
    special_tokens_as_text: bool
    forced_token_ids: Sequence[int]
    source_language: str
    target_language: str
    no_repeat_ngram_size: int
    num_beams: int
    length_penalty: float
    early_stopping: int


_SAMPLING = types_pb2.SamplingParams.DESCRIPTOR.fields_by_name.keys()
_RENAMED = {"stop": "stop.stop_strings", "logprobs": "logprobs.output", "prompt_logprobs": "logprobs.prompt"}


def _path(option: str) -> str:
    """Where an option is in ``GenerateRequest``."""
    if option in _RENAMED:
        return _RENAMED[option]
    if option in _SAMPLING:
        return f"sampling.{option}"
    if option in types_pb2.StopConditions.DESCRIPTOR.fields_by_name:
        return f"stop.{option}"
    if option in inference_pb2.BeamSearch.DESCRIPTOR.fields_by_name:
        return f"beam_search.{option}"
    return option


def build_request(prompt: Prompt, options: Mapping[str, Any]) -> inference_pb2.GenerateRequest:
    """The request for a prompt and the ``GenerateOptions`` given; one that is ``None`` counts as not given.

    Raises:
        InvalidRequestError: a value does not fit its field's type, or the prompt is an empty list; the server
            checks ranges.
        TypeError: an option does not exist, or the prompt is neither text, nor token ids, nor messages.
    """
    request = inference_pb2.GenerateRequest()
    _set_prompt(request, prompt)
    for option, value in options.items():
        if option not in GenerateOptions.__annotations__:
            raise TypeError(
                f"there is no option {option!r}; the options are {', '.join(GenerateOptions.__annotations__)}"
            )
        if value is None:
            continue
        if option == "stop" and isinstance(value, str):
            value = [value]
        *parents, field = _path(option).split(".")
        message: Any = request
        for parent in parents:
            message = getattr(message, parent)
        _set(message, field, value, _path(option))
    return request


def _set(message: ProtoMessage, field: str, value: Any, path: str) -> None:
    """Sets one field.

    Raises:
        InvalidRequestError: the value does not fit the field's type.
    """
    try:
        if isinstance(value, Mapping):
            getattr(message, field).update(value)
        elif isinstance(value, Iterable) and not isinstance(value, (str, *NO_LISTS)):
            getattr(message, field).extend(value)
        else:
            setattr(message, field, value)
    except (TypeError, ValueError, AttributeError) as error:
        _refuse(path, value, error)


def _refuse(path: str, value: object, error: Exception) -> NoReturn:
    text = repr(value)
    text = text if len(text) <= 80 else f"{text[:77]}..."
    violation = Violation(path, f"{text} does not fit: {error}")
    raise InvalidRequestError(str(violation), violations=[violation]) from error


def build_detokenize(
    token_ids: Sequence[int], model: str, *, keep_special_tokens: bool
) -> inference_pb2.DetokenizeRequest:
    """The request for the text of token ids.

    Raises:
        InvalidRequestError: they are no token ids.
    """
    request = inference_pb2.DetokenizeRequest(model=model, keep_special_tokens=keep_special_tokens)
    _set(request, "token_ids", token_ids, "token_ids")
    return request


def build_tokenize(
    value: str | Sequence[Message], model: str, *, special_tokens: bool, special_tokens_as_text: bool
) -> inference_pb2.TokenizeRequest:
    """The request for the token ids of text or a conversation.

    Raises:
        InvalidRequestError: a text or role is not valid Unicode.
        TypeError: it is neither text nor messages.
    """
    request = inference_pb2.TokenizeRequest(
        model=model,
        without_special_tokens=not special_tokens,
        special_tokens_as_text=special_tokens_as_text,
    )
    _set_input(request, value)
    return request


def build_count(
    value: str | Sequence[Message], model: str, *, special_tokens_as_text: bool
) -> inference_pb2.CountTokensRequest:
    """The request for how many tokens text or a conversation has; raises as ``build_tokenize``."""
    request = inference_pb2.CountTokensRequest(model=model, special_tokens_as_text=special_tokens_as_text)
    _set_input(request, value)
    return request


def _set_input(
    request: inference_pb2.TokenizeRequest | inference_pb2.CountTokensRequest, value: str | Sequence[Message]
) -> None:
    if isinstance(value, str):
        _set(request, "text", value, "text")
    else:
        _set_chat(request.chat, value)


def _set_prompt(request: inference_pb2.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        _set(request, "text", prompt, "text")
        return
    if not isinstance(prompt, Iterable) or isinstance(prompt, NO_LISTS):
        raise TypeError(f"a prompt is text, token ids or messages, not {type(prompt).__name__}")
    items: list[Any] = list(prompt)
    if not items:
        violation = Violation("prompt", "has no messages or token ids")
        raise InvalidRequestError(str(violation), violations=[violation])
    if isinstance(items[0], (types_pb2.ChatMessage, Mapping, tuple)):
        _set_chat(request.chat, items)
    else:
        _set(request.token_ids, "ids", items, "token_ids.ids")


def _set_chat(chat: types_pb2.Chat, messages: Sequence[Message]) -> None:
    chat.SetInParent()
    for index, message in enumerate(messages):
        path = f"chat.messages[{index}]"
        match message:
            case types_pb2.ChatMessage(role=role, content=content) | (role, content):
                pass
            case {"role": role, "content": content} if len(message) == 2:
                pass
            case _:
                raise TypeError(f"{path}: a message is a role and a content, not {message!r}")
        turn = chat.messages.add()
        _set(turn, "role", role, f"{path}.role")
        _set(turn, "content", content, f"{path}.content")
