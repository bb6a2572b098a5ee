"""A model's tokenizer and chat template, as its folder brings them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from tokenizers.decoders import ByteLevel

# This class reads tokenizer.json as it is. AutoTokenizer would read the model's config too, and for that
# import torch, which costs the server process seconds and hundreds of megabytes.
from transformers import PreTrainedTokenizerFast

from server.engine.types import RefusedError

_USUAL_ROLES = frozenset({"system", "user", "assistant", "tool", "developer"})


class TextError(ValueError):
    """A request's text can't be used; the message is a sentence for the client.

    Attributes:
        field: what is at fault, by its name in the request: ``text``, ``token_ids``, ``chat`` or part of it.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class Tokenizer:
    """Text to token ids and back. Methods may be called from several threads.

    Attributes:
        eos_token: the end-of-sequence token that the tokenizer names, ``None`` if it names none.
        special_tokens: tokens that are no text, such as those that mark the turns of a conversation: ids by
            spelling.
        special_token_ids: their ids.
        vocabulary_size: one more than the largest token id.
        has_chat_template: whether conversations can be encoded.
        byte_level: a token stands for the same bytes wherever it is, so that tokens of whole characters can
            be decoded one by one.
    """

    def __init__(self, folder: Path) -> None:
        """Loads from a Hugging Face folder.

        Raises:
            RefusedError: the folder has no ``tokenizer.json``, or an unreadable one.
        """
        if not (folder / "tokenizer.json").is_file():
            raise RefusedError(
                f"{folder} has no tokenizer.json; write one with transformers: "
                f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
            )
        try:
            self._pretrained = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise RefusedError(f"{folder}/tokenizer.json can't be read: {error}") from error
        # The wrapper changes its settings with every call, which is not safe between threads; this isn't.
        self._backend = self._pretrained.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocabulary_size: int = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.special_tokens: dict[str, int] = {
            added.content: token
            for token, added in self._backend.get_added_tokens_decoder().items()
            if added.special
        }
        self.special_token_ids = frozenset(self.special_tokens.values())
        self.eos_token: str | None = self._pretrained.eos_token
        self._template = _default_template(self._pretrained.chat_template)
        self.has_chat_template = self._template is not None
        self.byte_level = isinstance(self._backend.decoder, ByteLevel)
        anchor = self._backend.encode("a", add_special_tokens=False).ids[-1:]
        self._anchor: list[int] = anchor
        self._anchor_text: str = self._backend.decode(anchor)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. A special token that the text spells out becomes that token.

        Args:
            text: what to encode.
            add_special_tokens: add those with which the model expects a text to begin or end.

        Raises:
            TextError: the text has a lone surrogate.
        """
        _check_unicode("text", text)
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the model's next turn begins.

        As in transformers, what the template renders is encoded as one text. So content that spells out a
        special token, such as ``<|im_end|>``, becomes that token: whoever passes on the words of people that
        they don't trust has to take such spellings out first.

        Args:
            messages: the turns, oldest first, each with ``role`` and ``content``.

        Raises:
            TextError: the model has no chat template, the template refuses the conversation, a role is
                unknown to it, or a text has a lone surrogate.
        """
        if self._template is None:
            raise TextError("chat", "this model has no chat template; send the prompt as text")
        if not messages:
            raise TextError("chat.messages", "a conversation needs at least one message")
        for index, message in enumerate(messages):
            field = f"chat.messages[{index}]"
            _check_unicode(f"{field}.role", message["role"])
            _check_unicode(f"{field}.content", message["content"])
            self._check_role(f"{field}.role", message["role"], self._template)
        try:
            text = self._pretrained.apply_chat_template(
                [{"role": message["role"], "content": message["content"]} for message in messages],
                chat_template=self._template,
                add_generation_prompt=True,
                tokenize=False,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise TextError(
                "chat.messages", f"the model's chat template refuses this conversation: {error}"
            ) from error
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            TextError: an id is outside the vocabulary.
        """
        self.check_ids(token_ids)
        return self.decode_known(token_ids, skip_special_tokens=skip_special_tokens)

    def decode_known(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """``decode`` without its check, for ids that the model chose; those with no entry are no text."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """Checks that ids are in the vocabulary.

        Raises:
            TextError: one is not.
        """
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.vocabulary_size:
            index, token = next((i, t) for i, t in enumerate(token_ids) if not 0 <= t < self.vocabulary_size)
            raise TextError(
                "token_ids",
                f"token id {token} at index {index}: the vocabulary has ids 0 to {self.vocabulary_size - 1}",
            )

    def token_id(self, token: str) -> int | None:
        """The id of an entry of the vocabulary, ``None`` if there is none of that spelling."""
        known: int | None = self._backend.token_to_id(token)
        return known

    def token(self, token_id: int) -> str:
        """A token's entry in the vocabulary, such as ``Ġthe``; empty for an id that has none."""
        return self._backend.id_to_token(token_id) or ""

    @functools.lru_cache(maxsize=65536)  # noqa: B019 (a process has one tokenizer, and keeps it)
    def token_text(self, token_id: int) -> str:
        """A token's text as it stands within a text, such as ``" the"``; special tokens are spelled out."""
        # Some decoders drop the space at the beginning of a text, hence a token in front.
        text: str = self._backend.decode([*self._anchor, token_id], skip_special_tokens=False)
        return text.removeprefix(self._anchor_text)

    @functools.lru_cache(maxsize=65536)  # noqa: B019 (as above)
    def decode_alone(self, token_id: int, skip_special_tokens: bool) -> str:
        """``decode_known`` of one token, kept: a look-up costs a fraction of decoding."""
        return self.decode_known([token_id], skip_special_tokens=skip_special_tokens)

    def is_text(self, token_id: int, *, skip_special_tokens: bool) -> bool:
        """Whether decoding gives the token any text, or part of a character."""
        if skip_special_tokens and token_id in self.special_token_ids:
            return False
        return bool(self.token(token_id))

    @staticmethod
    def _check_role(field: str, role: str, template: str) -> None:
        if role in _USUAL_ROLES or (role and (f"'{role}'" in template or f'"{role}"' in template)):
            return
        raise TextError(
            field, f"the model's chat template has no role {role!r}; usual are system, user and assistant"
        )


def _check_unicode(field: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            field, f"the character at index {error.start} is a lone surrogate, which no valid text has"
        ) from None


def _default_template(template: str | dict[str, str] | None) -> str | None:
    return template.get("default") if isinstance(template, dict) else template
