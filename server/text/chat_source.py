"""Which of the chat templates that come with a model is used."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import RefusedError

log = logging.getLogger("longspan.text")

# Where transformers' processors keep what its tokenizers have in files of their own.
_PROCESSOR_FILES = ("processor_config.json", "chat_template.json")


@dataclass(frozen=True, slots=True)
class ChatSource:
    """A chat template, or why there is none.

    Attributes:
        template: in Jinja; ``None`` where none can be used.
        place: where it is from, as part of a sentence.
        refusal: why there is none, what a sentence says of the model.
        asked: the operator named it.
    """

    template: str | None = None
    place: str = ""
    refusal: str = ""
    asked: bool = False


NO_TEMPLATE = ChatSource(refusal="has no chat template")


def choose_template(folder: Path, own: Any, asked: str | None) -> ChatSource:
    """The template that the operator asked for; else transformers' choice; else the only one.

    Args:
        folder: the model's.
        own: what transformers' tokenizer found there: a template, some by name, or nothing. It reads
            ``chat_template.jinja``, ``additional_chat_templates`` and ``tokenizer_config.json``.
        asked: the name of a template, or a file with one.

    Raises:
        RefusedError: what was asked for is not there, or can't be read.
    """
    found = _named(folder, own)
    if asked is not None:
        return _asked(asked, found)
    if not found:
        return NO_TEMPLATE
    if "default" in found:
        return found["default"]
    if len(found) > 1:
        names = ", ".join(sorted(found))
        return ChatSource(
            refusal=f"has chat templates named {names}, of which none is the default; start the server with "
            "--chat-template NAME to choose one"
        )
    ((name, only),) = found.items()
    log.info("the model's only chat template, named %s, is used", name)
    return only


def may_have_template(folder: Path, asked: str | None) -> bool:
    """Whether ``choose_template`` may find one, told without reading templates.

    Args:
        folder: the model's.
        asked: as there.
    """
    files = ("chat_template.jinja", "additional_chat_templates", *_PROCESSOR_FILES)
    if asked is not None or any((folder / name).exists() for name in files):
        return True
    try:
        return b"chat_template" in (folder / "tokenizer_config.json").read_bytes()
    except OSError:
        return False


def _asked(asked: str, found: Mapping[str, ChatSource]) -> ChatSource:
    if asked in found:
        chosen = found[asked]
        return ChatSource(chosen.template, chosen.place, chosen.refusal, asked=True)
    try:
        text = Path(asked).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(sorted(found)) or "none"
        raise RefusedError(
            f"--chat-template {asked} is neither the name of one of the model's templates ({names}) nor a "
            f"file that can be read ({getattr(error, 'strerror', None) or error})"
        ) from None
    return ChatSource(text, asked, asked=True)


def _named(folder: Path, own: Any) -> dict[str, ChatSource]:
    if own is None:
        return _of_processor(folder)
    templates = own if isinstance(own, Mapping) else {"default": own}
    return {name: _source(template, _place(folder, name)) for name, template in templates.items()}


def _place(folder: Path, name: str) -> str:
    file = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
    return file if (folder / file).is_file() else "tokenizer_config.json"


def _of_processor(folder: Path) -> dict[str, ChatSource]:
    for file in _PROCESSOR_FILES:
        try:
            value = json.loads((folder / file).read_text(encoding="utf-8")).get("chat_template")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as error:
            return {"default": ChatSource(refusal=f"has a {file} that can't be read: {error}")}
        if isinstance(value, list) and all(isinstance(one, dict) and "name" in one for one in value):
            value = {str(one["name"]): one.get("template") for one in value}
        if value is not None:
            templates = value if isinstance(value, Mapping) else {"default": value}
            return {name: _source(template, file) for name, template in templates.items()}
    return {}


def _source(template: Any, place: str) -> ChatSource:
    if isinstance(template, str):
        return ChatSource(template, place)
    return ChatSource(refusal=f"has a chat template in {place} that is no text")
