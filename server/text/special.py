"""Prompts in which special tokens that a client's words spell out stay words.

A second tokenizer knows the special tokens by names that no text has. The client's text goes through it as
it is; where the chat template wrote a special token, that name is put in its place. The text is not cut, so
all other tokens are those that the first tokenizer gives.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
from typing import Any

from tokenizers import Tokenizer

from server.panics import without_panics
from server.text.chat import ChatTemplate, Messages
from server.text.encode import token_ids
from server.text.errors import TextError

# Names begin and end with it. It is for private use, so that no text has it by chance.
_DELIMITER = "\U0010fffd"
# Stands before what stays text. No message has it: it is a lone surrogate.
_MARK = "\ud800"


class SpecialAsText:
    """Encodes so. Methods may be called from several threads; the first call takes as long as loading.

    Taken as special are the tokens that the tokenizer says are, and those beside them that the chat template
    writes: some tokenizers don't mark the tokens between turns.
    """

    def __init__(self, backend: Tokenizer, chat: ChatTemplate) -> None:
        self._backend = backend
        self._chat = chat
        self._lock = threading.Lock()
        self._renamed: _Renamed | None = None
        self._possible = True

    def encode(self, text: str, *, add_special_tokens: bool, most: int | None = None) -> list[int]:
        """Token ids of a text; special are only those that the tokenizer adds.

        Raises:
            TextError: the tokenizer can't do it, or not with a character of this text.
        """
        renamed = self._load()
        _check_delimiter("text", text)
        return token_ids(renamed.tokenizer, text, add_special_tokens=add_special_tokens, most=most)

    def encode_chat(self, messages: Messages, *, most: int | None = None) -> list[int]:
        """Token ids of a conversation; special are only the tokens that the template writes.

        Raises:
            TextError: as of ``ChatTemplate.render`` and ``encode``; or what the template does with a message
                depends on the special tokens in it.
        """
        rendered = self._chat.render(messages)
        renamed = self._load()
        for index, message in enumerate(messages):
            for part in ("role", "content"):
                _check_delimiter(f"chat.messages[{index}].{part}", message[part])
        # Marks tell what the client began to spell from what the template did. A template that looks for such
        # a spelling may be misled by a mark; then the prompt differs in more than the marks.
        for insert in (renamed.mark_beginnings, renamed.mark_spellings):
            if all(insert(text) == text for message in messages for text in message.values()):
                return renamed.encode_marked(rendered, most)  # rendered anew, it may tell another time
            try:
                marked = self._chat.render(messages, insert)
            except TextError:
                continue
            if marked.replace(_MARK, "") == rendered:
                return renamed.encode_marked(marked, most)
        raise TextError(
            "special_tokens_as_text",
            "what the model's chat template makes of this conversation depends on special tokens that its "
            "messages spell out, so they can't be kept text; take them out",
        )

    def _load(self) -> _Renamed:
        with self._lock:
            if not self._possible:  # to find that out again would take as long
                raise _impossible()
            if self._renamed is None:
                self._possible = False
                self._renamed = _Renamed(self._backend, self._chat.writes())
                self._possible = True
            return self._renamed


class _Renamed:
    """A copy of a tokenizer that knows special tokens by other names.

    Attributes:
        tokenizer: the copy.
    """

    def __init__(self, backend: Tokenizer, written: str) -> None:
        added = {
            id_: token
            for id_, token in backend.get_added_tokens_decoder().items()
            if token.special or (token.content in written and not token.content.isspace())
        }
        tokens = {token.content: id_ for id_, token in added.items()}
        self._names = {token: f"{_DELIMITER}{id_}{_DELIMITER}" for token, id_ in tokens.items()}
        if any(
            token.normalized and not _keeps(backend, self._names[token.content]) for token in added.values()
        ):
            raise _impossible()  # what is left of the name might be found in a text
        characters = backend.get_vocab(with_added_tokens=False).keys()
        if any(len(token) == 1 and token in characters for token in tokens):
            raise _impossible()  # renamed, it would leave nothing to write that character with
        try:
            document = _rename(json.loads(backend.to_str()), self._names)
            self.tokenizer = without_panics(Tokenizer.from_str)(json.dumps(document))
            ids = token_ids(self.tokenizer, "".join(self._names.values()), add_special_tokens=False)
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise _impossible() from error
        # Some number their tokens anew.
        if [id_ for id_ in ids if id_ in tokens.values()] != list(tokens.values()):
            raise _impossible()
        self._spelling = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"
        firsts = {token[0] for token in tokens}
        self._beginning = re.compile("|".join(map(re.escape, firsts)) or "(?!)")
        self._whole = re.compile(f"(?={self._spelling})")
        self._longest = max(map(len, tokens), default=0)

    def mark_beginnings(self, text: str) -> str:
        """Puts a mark before each character with which a special token's spelling may begin."""
        return self._beginning.sub(rf"{_MARK}\g<0>", text)

    def mark_spellings(self, text: str) -> str:
        """Puts a mark before each spelling, and before one that the text's end breaks off.

        The template may write the rest of that one next, also where it strips spaces.
        """
        body = text.rstrip()
        ends = range(max(0, len(body) - self._longest), len(body))
        places = {match.start() for match in self._whole.finditer(text)}
        places.update(place for place in ends if any(token.startswith(body[place:]) for token in self._names))
        cuts = [0, *sorted(places), len(text)]
        return _MARK.join(text[start:end] for start, end in itertools.pairwise(cuts))

    def encode_marked(self, text: str, most: int | None) -> list[int]:
        """Token ids of a text in which a mark stands before each spelling that is to stay one."""
        pattern = re.compile(f"({_MARK})?({self._spelling})|{_MARK}")
        plain = pattern.sub(
            lambda match: match[2] if match[1] else self._names[match[2]] if match[2] else "", text
        )
        return token_ids(self.tokenizer, plain, add_special_tokens=False, most=most)


@without_panics
def _keeps(backend: Tokenizer, name: str) -> bool:
    return backend.normalizer is None or name in backend.normalizer.normalize_str(name)


def _rename(document: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Gives tokens other names in a tokenizer's JSON, and takes them out of merges: they are no text."""
    for token in document["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = document["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): id_ for token, id_ in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [
            pair
            for pair in (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
            if names.keys().isdisjoint({*pair, "".join(pair)})
        ]
    return document


def _check_delimiter(field: str, text: str) -> None:
    if _DELIMITER in text:
        raise TextError(
            field,
            "has the character U+10FFFD, which stands for special tokens where those spelled out are kept "
            "text; take it out",
        )


def _impossible() -> TextError:
    return TextError(
        "special_tokens_as_text", "this model's tokenizer can't keep spelled-out special tokens text"
    )
