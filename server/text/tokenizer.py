"""A model's tokenizer and chat template, as its folder brings them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from server.errors import RefusedError
from server.panics import without_panics
from server.text.chat import ChatTemplate, Messages
from server.text.chat_source import choose_template
from server.text.decoding import Decoding
from server.text.encode import token_ids
from server.text.encoder_texts import EncoderText, Input, encoder_texts
from server.text.errors import TextError, check_unicode
from server.text.light import alone
from server.text.special import SpecialAsText
from server.text.token_text import TokenTexts

# This class reads tokenizer.json as it is. AutoTokenizer would read the model's config too, and for that
# import torch, which costs the server process seconds and hundreds of megabytes.
_PreTrainedTokenizerFast = alone("transformers.tokenization_utils_tokenizers").PreTrainedTokenizerFast


class Tokenizer(Decoding):
    """Text to token ids and back. Methods may be called from several threads.

    Attributes, beside those of ``Decoding``:
        folder: that it came from, ``None`` where there is none.
        chat_template: the one in use, in Jinja; ``None`` if there is none.
        eos_token: the end-of-sequence token that the tokenizer names, ``None`` if it names none.
        mask_token: how a text spells a mask, ``None`` if the tokenizer has none.
        vocabulary_size: one more than the largest token id.
        longest_token_bytes: the most bytes of text that one token stands for.
        has_text: whether there is a tokenizer at all.
        has_chat_template: whether conversations can be encoded.
        chat_refusal: why they can't, what a sentence says of the model.
        token_text: a token's text as it stands within a text, such as ``" the"``, by its id.
    """

    @without_panics
    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        """Loads from a Hugging Face folder.

        Args:
            folder: the model's.
            chat_template: name of one of its templates, or a file with one. Without it: transformers' choice.

        Raises:
            RefusedError: the folder has no ``tokenizer.json``, or an unreadable one; or the template that was
                asked for can't be used.
        """
        if not (folder / "tokenizer.json").is_file():
            raise RefusedError(f"{folder} has no tokenizer.json")
        try:
            self._pretrained = _PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise RefusedError(
                f"{folder}: tokenizer.json, tokenizer_config.json or a chat template can't be read: {error}"
            ) from error
        # The wrapper changes its settings with every call, which is not safe between threads; this isn't.
        super().__init__(self._pretrained.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocabulary_size: int = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.has_text = True
        self.eos_token: str | None = self._pretrained.eos_token
        mask = self._pretrained.mask_token
        self.mask_token: str | None = mask if mask in self.special_tokens else None
        source = choose_template(folder, self._pretrained.chat_template, chat_template)
        self._chat = ChatTemplate(self._pretrained, source)
        self.folder: Path | None = folder
        self.chat_template = source.template
        self.has_chat_template = not self._chat.refusal
        self.chat_refusal = self._chat.refusal
        self._special_as_text = SpecialAsText(self._backend, self._chat)
        self.longest_token_bytes = _longest_token_bytes(self._backend, byte_level=self.byte_level)
        self.token_text: Callable[[int], str] = TokenTexts(self._backend, byte_level=self.byte_level).of

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        special_tokens_as_text: bool = False,
        most: int | None = None,
    ) -> list[int]:
        """Token ids of a text. A special token that the text spells out becomes that token.

        Args:
            text: what to encode.
            add_special_tokens: add those with which the model expects a text to begin or end.
            special_tokens_as_text: those that the text spells out stay text.
            most: how many there may be; ``None`` for any number.

        Raises:
            TooManyTokensError: there are more.
            TextError: the text has a lone surrogate, or spellings in it can't be kept text.
        """
        check_unicode("text", text)
        if special_tokens_as_text:
            return self._special_as_text.encode(text, add_special_tokens=add_special_tokens, most=most)
        return token_ids(self._backend, text, add_special_tokens=add_special_tokens, most=most)

    def encoder_texts(self, texts: Sequence[Input], *, most: int, truncate: bool) -> list[EncoderText]:
        """See ``server.text.encoder_texts``."""
        return encoder_texts(self._backend, texts, most=most, truncate=truncate)

    def encode_chat(
        self, messages: Messages, *, special_tokens_as_text: bool = False, most: int | None = None
    ) -> list[int]:
        """Token ids of a conversation, up to where the model's next turn begins.

        As in transformers, what the template renders is encoded as one text. So content that spells out a
        special token, such as ``<|im_end|>``, becomes that token, unless it is asked to stay text.

        Args:
            messages: the turns, oldest first, each with ``role`` and ``content``.
            special_tokens_as_text: special tokens that roles and contents spell out stay text.
            most: how many there may be; ``None`` for any number.

        Raises:
            TooManyTokensError: there are more.
            TextError: the template can't render the conversation, a text has a lone surrogate, or spellings
                can't be kept text.
        """
        if special_tokens_as_text:
            return self._special_as_text.encode_chat(messages, most=most)
        return token_ids(self._backend, self._chat.render(messages), add_special_tokens=False, most=most)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            TextError: an id is outside the vocabulary.
        """
        self.check_ids(token_ids)
        return self.decode_known(token_ids, skip_special_tokens=skip_special_tokens)

    @without_panics
    def decode_aside(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """``decode_known`` for many tokens, during which other threads run."""
        (text,) = self._backend.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)
        return text

    def to_json(self) -> str:
        """It in the form of ``tokenizer.json``, without padding and truncation."""
        text: str = self._backend.to_str()
        return text

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
        try:
            known: int | None = self._backend.token_to_id(token)
        except UnicodeEncodeError:  # half of a surrogate pair, as JSON can spell it
            return None
        return known


def _longest_token_bytes(backend: Any, *, byte_level: bool) -> int:
    """Bytes of the longest token's text, from the vocabulary's entries; no fewer than it has."""
    # Byte-level entries have one letter for each byte. Others are the text, where a space is a longer letter.
    sizes = {
        len(entry if byte_level else entry.encode()) for entry in backend.get_vocab(with_added_tokens=False)
    }
    sizes.update(len(added.content.encode()) for added in backend.get_added_tokens_decoder().values())
    return max(sizes)
