"""From what a request says to the token ids of its prompt."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable

from longspan.v1 import inference_pb2, types_pb2
from server.api import errors
from server.api.errors import Violation
from server.api.state import Served
from server.text.errors import TextError

# A longer text is tokenized in a thread: it would hold up every stream for more than about a millisecond.
_THREAD_CHARACTERS = 2000
# Rendering a message takes as long as tokenizing about so many.
_MESSAGE_CHARACTERS = 50


async def prompt_ids(request: inference_pb2.GenerateRequest, served: Served) -> list[int]:
    """The prompt's token ids, at least one, with room in the context for one more and for the forced ones.

    Raises:
        ServiceError: the prompt has no tokens, too many of them, or the chat template refuses it.
    """
    kind = request.WhichOneof("prompt")
    if kind == "token_ids":
        ids = list(request.token_ids.ids)  # no more than fit, by the checks before
    elif kind == "chat":
        ids = await chat_ids(request.chat, served, as_text=request.special_tokens_as_text)
    else:
        ids = await text_ids(request.text, served, as_text=request.special_tokens_as_text)
    if not ids:
        raise errors.invalid([Violation(str(kind), "has no tokens; send at least one character")])
    if max(ids) >= served.ready.vocabulary_size:  # some tokenizers know more tokens than their model
        raise errors.invalid([Violation(str(kind), f"has token {max(ids)}, which the model does not know")])
    limit = served.ready.context_length - 1
    if len(ids) > limit:
        raise errors.prompt_too_long(str(kind), len(ids), limit)
    context, forced = served.ready.context_length, len(request.forced_token_ids)
    if len(ids) + forced > context:
        sentence = (
            f"has {forced} ids; after a prompt of {len(ids)} tokens the context of {context} has room for "
            f"{context - len(ids)}"
        )
        raise errors.invalid([Violation("forced_token_ids", sentence)])
    return ids


async def text_ids(text: str, served: Served, *, special: bool = True, as_text: bool = False) -> list[int]:
    """Token ids of a text, with the tokens that the tokenizer adds unless ``special`` is false.

    Raises:
        ServiceError: special tokens that the text spells out can't be kept text, as ``as_text`` asks.
    """
    encode = functools.partial(
        served.tokenizer.encode, text, add_special_tokens=special, special_tokens_as_text=as_text
    )
    return await _encoded(encode, at_once=len(text) <= _THREAD_CHARACTERS and not as_text)


async def chat_ids(chat: types_pb2.Chat, served: Served, *, as_text: bool = False) -> list[int]:
    """Token ids of a conversation, up to where the assistant speaks.

    Raises:
        ServiceError: the model has no template, or the template refuses the conversation; or special tokens
            that it spells out can't be kept text, as ``as_text`` asks.
    """
    if not served.tokenizer.has_chat_template:
        raise errors.no_chat_template(served.name, served.tokenizer.chat_refusal)
    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    size = sum(len(message.role) + len(message.content) + _MESSAGE_CHARACTERS for message in chat.messages)
    encode = functools.partial(served.tokenizer.encode_chat, messages, special_tokens_as_text=as_text)
    return await _encoded(encode, at_once=size <= _THREAD_CHARACTERS and not as_text)


async def _encoded(encode: Callable[[], list[int]], *, at_once: bool) -> list[int]:
    try:
        return encode() if at_once else await asyncio.to_thread(encode)
    except TextError as error:
        raise errors.invalid([Violation(error.field, str(error))]) from error


def check_tokenizer(served: Served) -> None:
    """Refuses what needs text.

    Raises:
        ServiceError: the model has no tokenizer.
    """
    if not served.tokenizer.has_text:
        raise errors.no_tokenizer(served.name)
