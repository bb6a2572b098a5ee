"""A model's chat template: what it does with a conversation is found out by rendering, not by reading it.

Templates are programs. One may take contents as texts or as lists of parts, print any role or know a few,
and leave messages out without a word. So conversations of the same roles are rendered with words of our own
first, and the words must be found in the prompt.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from server.errors import RefusedError
from server.text.chat_source import NO_TEMPLATE, ChatSource
from server.text.errors import TextError, check_unicode
from server.text.template_process import NotRenderedError, TemplateEndedError, template_process

log = logging.getLogger("longspan.text")

# Every template that has roles at all has these, by some name of its own.
_USUAL_ROLES = frozenset({"system", "user", "assistant"})
_NO_ROLE = "zqrolezq"
_WORD = re.compile(r"zq(\d+)zq")
# A part that was printed as it is, as Python or JSON, where its text should be.
_PART = re.compile(r"""['"]text['"]: ?['"]zq(\d+)zq""")
# Each costs a rendering.
_MOST_UNUSUAL_ROLES = 16
# Findings about conversations are kept by their roles; those about longer ones are made again.
_KEPT = 256
_KEPT_CHARACTERS = 4096

# A status has room for a few thousand characters, of which some letters take twelve.
_MOST_SAID, _MOST_QUOTED = 200, 40

_QUESTION, _SYSTEM, _TURNS = ("user",), ("system", "user"), ("user", "assistant", "user")

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class _Finding:
    """A finding: how the template treats conversations of certain roles.

    Attributes:
        parts: for each message, whether its content is passed as a list of parts.
        problem: index, field and sentence for a message that would be served wrong.
        failure: what the template raised, where it rendered nothing.
    """

    parts: tuple[bool, ...]
    problem: tuple[int, str, str] | None = None
    failure: Exception | None = None


class ChatTemplate:
    """Renders conversations as transformers does, and refuses those that would not be rendered whole.

    Attributes:
        refusal: why no conversation can be rendered, what a sentence says of the model; empty if they can.
        template: as it was chosen; ``None`` if there is none.
    """

    def __init__(self, pretrained: Any, source: ChatSource) -> None:
        """Proves that what a user says reaches the prompt.

        Args:
            pretrained: transformers' tokenizer, whose special tokens templates write by name.
            source: the template.

        Raises:
            RefusedError: the template that the operator asked for can't be used.
        """
        self._tokens = {name: str(token) for name, token in pretrained.special_tokens_map.items()}
        self.template = source.template
        self._parts = False
        self._kept = functools.lru_cache(maxsize=_KEPT)(self._examine)
        try:
            self.refusal = source.refusal or self._prove(source.place)
        except NotRenderedError as error:
            raise RefusedError(str(error)) from error
        if self.refusal and source.asked:
            raise RefusedError(f"--chat-template: the model {self.refusal}")
        if source is NO_TEMPLATE:
            return  # as usual for models that weren't made for conversations
        if self.refusal:
            log.warning("conversations are refused: the model %s", self.refusal)
        else:
            self._tell()

    def render(self, messages: Messages, alter: Callable[[str], str] = str) -> str:
        """The prompt for a conversation, up to where the model's next turn begins.

        Args:
            messages: the turns, oldest first, each with ``role`` and ``content``.
            alter: applied to every role and content after they have been checked.

        Raises:
            TextError: there is no template, it refuses the conversation, has no such role, or would leave a
                message out; or a text has a lone surrogate.
            NotRenderedError: the process that renders it was lost.
        """
        if self.refusal:
            raise TextError("chat", f"this model {self.refusal}; send the prompt as text")
        if not messages:
            raise TextError("chat.messages", "a conversation needs at least one message")
        for index, message in enumerate(messages):
            field = f"chat.messages[{index}]"
            check_unicode(f"{field}.role", message["role"])
            check_unicode(f"{field}.content", message["content"])
            if not message["role"]:
                raise TextError(f"{field}.role", "is empty; name who speaks, such as user")
        try:
            finding = self._find([message["role"] for message in messages])
        except TemplateEndedError as error:
            raise _refuses(error) from error
        if finding.problem is not None:
            index, part, sentence = finding.problem
            raise TextError(f"chat.messages[{index}]{part}", sentence)
        turns = [(alter(message["role"]), alter(message["content"])) for message in messages]
        try:
            text = self._render(turns, finding.parts)
        except NotRenderedError:
            raise
        except Exception as error:
            raise _refuses(error) from error
        if finding.failure is not None:  # it took these contents, though not ours
            _check_whole(text, turns)
        return text

    def writes(self) -> str:
        """Text that the template may write by itself: its own, and prompts for a few conversations."""
        if self.template is None:
            return ""
        texts = [self.template]
        for roles in (_QUESTION, _SYSTEM, _TURNS):
            finding = self._try(roles)
            if finding.failure is None:
                texts.append(self._render(_words(roles), finding.parts))
        return "\n".join(texts)

    def _render(self, turns: Sequence[tuple[str, str]], parts: Sequence[bool]) -> str:
        messages = [
            {"role": role, "content": [{"type": "text", "text": content}] if as_parts else content}
            for (role, content), as_parts in zip(turns, parts, strict=True)
        ]
        assert self.template is not None
        return template_process().render(self.template, messages, self._tokens)

    def _try(self, roles: Sequence[str]) -> _Finding:
        """``_find`` of words of our own, where a template that was ended is one that fails."""
        try:
            return self._find(roles)
        except TemplateEndedError as error:
            return _Finding((False,) * len(roles), failure=error)

    def _find(self, roles: Sequence[str]) -> _Finding:
        find = self._kept if sum(map(len, roles)) <= _KEPT_CHARACTERS else self._examine
        return find(tuple(roles))

    def _examine(self, roles: tuple[str, ...]) -> _Finding:
        unusual = sorted(set(roles) - _USUAL_ROLES)
        if len(unusual) > _MOST_UNUSUAL_ROLES:
            sentence = (
                f"is one of {len(unusual)} unusual roles; a conversation may have {_MOST_UNUSUAL_ROLES}"
            )
            return _Finding((), (roles.index(unusual[0]), ".role", sentence))
        turns = _words(roles)
        tried: list[tuple[set[int], tuple[bool, ...], str]] = []
        failure: Exception | None = None
        texts, lists = (False,) * len(roles), (True,) * len(roles)
        for parts in (texts, None, lists):
            if parts is None:  # of some roles as texts, of others as parts
                if not tried:
                    continue
                lost = tried[0][0]
                parts = tuple(index in lost for index in range(len(roles)))
            try:
                text = self._render(turns, parts)
                text.encode()  # escapes in a template can write lone surrogates, which are no text
            except (TemplateEndedError, NotRenderedError):  # no finding to keep: the machine may be busy
                raise
            except Exception as error:  # a template is a program, and raises whatever it likes
                failure = failure or error
                continue
            folded = text.casefold()
            shown = {int(index) for index in _WORD.findall(folded)}
            if any(parts):
                shown -= {int(index) for index in _PART.findall(folded)}
            lost = set(range(len(roles))) - shown
            tried.append((lost, parts, text))
            if not lost:
                break
        if not tried:
            return _Finding((self._parts,) * len(roles), failure=failure)
        lost, parts, text = min(tried, key=lambda one: len(one[0]))
        if lost:
            index = min(lost)
            instead = "send fewer messages" if roles[index] == "user" else "say it in a user's message"
            sentence = (
                f"the model's chat template leaves a message of role {_quote(roles[index])} in this place "
                f"out of the prompt; {instead}"
            )
            return _Finding(parts, (index, "", sentence))
        for role in unusual:
            if self._ignores(role, turns, parts, text):
                sentence = (
                    f"the model's chat template has no role {_quote(role)}; usual are system, user and "
                    "assistant"
                )
                return _Finding(parts, (roles.index(role), ".role", sentence))
        return _Finding(parts)

    def _ignores(self, role: str, turns: Sequence[tuple[str, str]], parts: Sequence[bool], text: str) -> bool:
        """Whether the prompt would be the same if the role had a name that no template knows."""
        renamed = [(_NO_ROLE if turn[0] == role else turn[0], turn[1]) for turn in turns]
        try:
            return self._render(renamed, parts) == text
        except (TemplateEndedError, NotRenderedError):
            raise
        except Exception:
            return False

    def _prove(self, place: str) -> str:
        """Why no conversation can be rendered, empty if they can."""
        first = self._try(_QUESTION)
        found = first
        ended = isinstance(first.failure, TemplateEndedError)
        if not ended and (first.failure is not None or first.problem is not None):
            found = self._try(_SYSTEM)  # some templates insist on one
        if found.failure is None and found.problem is None:
            self._parts = found.parts[-1]
            return ""
        if isinstance(first.failure, jinja2.TemplateSyntaxError):
            error = first.failure
            what = (error.message or "").rstrip(".")
            return f"has a chat template with an error in line {error.lineno} of {place}: {what}"
        if first.failure is not None:
            return f"has a chat template in {place} that fails on a plain question: {_short(first.failure)}"
        return (
            f"has a chat template in {place} that leaves what the user says out of the prompt, whether it is "
            "passed as text or as parts"
        )

    def _tell(self) -> None:
        if self._parts:
            log.info("the chat template takes contents as lists of parts, and gets them so")
        system = self._try(_SYSTEM)
        if system.problem or system.failure:
            why = f": {_short(system.failure)}" if system.failure else ", since the template leaves them out"
            log.info("system messages are refused%s", why)
        turns = self._try(_TURNS)
        if turns.problem or turns.failure:
            why = (
                f": {_short(turns.failure)}"
                if turns.failure
                else ", since the template leaves some of them out"
            )
            log.warning("conversations of several turns are refused%s", why)


def _refuses(error: Exception) -> TextError:
    return TextError("chat.messages", f"the model's chat template refuses this conversation: {_short(error)}")


def _short(error: Exception) -> str:
    """A template's message, cut, since it may quote the conversation."""
    text = str(error) or type(error).__name__
    return text if len(text) <= _MOST_SAID else text[:_MOST_SAID] + "..."


def _quote(role: str) -> str:
    return ascii(role if len(role) <= _MOST_QUOTED else role[:_MOST_QUOTED] + "...")


def _words(roles: Sequence[str]) -> list[tuple[str, str]]:
    return [(role, f"zq{index}zq") for index, role in enumerate(roles)]


def _check_whole(text: str, turns: Sequence[tuple[str, str]]) -> None:
    for index, (_, content) in enumerate(turns):
        if content.strip() not in text:
            raise TextError(
                f"chat.messages[{index}].content", "the model's chat template leaves it out of the prompt"
            )
