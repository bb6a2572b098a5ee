"""From what a request says to the token ids of its prompt."""

from __future__ import annotations

import functools
from collections.abc import Callable

from longspan.v1 import inference_pb2, types_pb2
from server.api import errors
from server.api.errors import Violation
from server.api.languages import in_language
from server.api.state import Served, ServerState
from server.api.text_work import TextWork
from server.text.errors import TextError, TooManyTokensError
from server.text.template_process import NotRenderedError

# A longer text is tokenized in a thread: it would hold up every stream for more than about a millisecond.
THREAD_CHARACTERS = 2000
# Rendering a message takes as long as tokenizing about so many.
_MESSAGE_CHARACTERS = 50
# About what the process that renders takes to start.
_RETRY_SECONDS = 3.0


async def prompt_ids(request: inference_pb2.GenerateRequest, served: Served, state: ServerState) -> list[int]:
    """The prompt's token ids, at least one, with room in the context for one more and for the forced ones.

    Raises:
        ServiceError: the prompt has no tokens, too many of them, or the chat template refuses it.
    """
    kind = request.WhichOneof("prompt")
    limit = served.longest_prompt
    as_text = request.special_tokens_as_text
    try:
        if kind == "token_ids":
            ids = list(request.token_ids.ids)  # no more than fit, by the checks before
        elif kind == "chat":
            ids = await chat_ids(request.chat, served, state, limit, as_text=as_text)
        else:
            ids = await text_ids(request.text, served, state, limit, as_text=as_text)
    except TooManyTokensError as error:
        raise errors.prompt_too_long(str(kind), error.count, limit) from error
    if not ids:
        raise errors.invalid([Violation(str(kind), "has no tokens; send at least one character")])
    if max(ids) >= served.ready.vocabulary_size:  # some tokenizers know more tokens than their model
        raise errors.invalid([Violation(str(kind), f"has token {max(ids)}, which the model does not know")])
    if served.generation.target is not None:  # whose output has a length of its own
        return in_language(request, ids, served)
    context, forced = served.ready.context_length, len(request.forced_token_ids)
    if len(ids) + forced > context:
        sentence = (
            f"has {forced} ids; after a prompt of {len(ids)} tokens the context of {context} has room for "
            f"{context - len(ids)}"
        )
        raise errors.invalid([Violation("forced_token_ids", sentence)])
    return ids


async def text_ids(
    text: str, served: Served, state: ServerState, most: int, *, special: bool = True, as_text: bool = False
) -> list[int]:
    """Token ids of a text, ``most`` at the most, with those that the tokenizer adds unless not ``special``.

    Raises:
        ServiceError: special tokens that the text spells out can't be kept text, as ``as_text`` asks; or too
            many texts wait.
        TooManyTokensError: the text has more.
    """
    encode = functools.partial(
        served.tokenizer.encode, text, add_special_tokens=special, special_tokens_as_text=as_text, most=most
    )
    if len(text) <= THREAD_CHARACTERS and not as_text:
        return _encoded(encode)
    return await _beside(encode, len(text), state.text_work)


async def chat_ids(
    chat: types_pb2.Chat, served: Served, state: ServerState, most: int, *, as_text: bool = False
) -> list[int]:
    """Token ids of a conversation, ``most`` at the most, up to where the assistant speaks.

    Raises:
        ServiceError: the model has no template, or the template refuses the conversation; special tokens that
            it spells out can't be kept text, as ``as_text`` asks; or too many texts wait.
        TooManyTokensError: the conversation has more.
    """
    if not served.tokenizer.has_chat_template:
        raise errors.no_chat_template(served.name, served.tokenizer.chat_refusal)
    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    size = sum(len(message["role"]) + len(message["content"]) + _MESSAGE_CHARACTERS for message in messages)
    encode = functools.partial(
        served.tokenizer.encode_chat, messages, special_tokens_as_text=as_text, most=most
    )
    # The process that renders waits for no one's long text.
    return await _beside(encode, size, state.chat_work if size <= THREAD_CHARACTERS else state.text_work)


async def _beside(encode: Callable[[], list[int]], size: int, work: TextWork) -> list[int]:
    return await work.run(functools.partial(_encoded, encode), size)


def _encoded(encode: Callable[[], list[int]]) -> list[int]:
    try:
        return encode()
    except TextError as error:
        raise errors.invalid([Violation(error.field, str(error))]) from error
    except NotRenderedError as error:
        sentence = "the process that renders chat templates was lost; try again, since another is started"
        raise errors.unavailable("CHATS_UNAVAILABLE", sentence, _RETRY_SECONDS) from error


def check_tokenizer(served: Served) -> None:
    """Refuses what needs text.

    Raises:
        ServiceError: the model has no tokenizer.
    """
    if not served.tokenizer.has_text:
        raise errors.no_tokenizer(served.name)
