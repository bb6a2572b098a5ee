"""A model's tokenizer, or what stands for one that it lacks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from server.errors import RefusedError

if TYPE_CHECKING:
    from server.text.tokenizer import Tokenizer

log = logging.getLogger("longspan.server")


def load_tokenizer(folder: Path | None, source: str, chat_template: str | None) -> Tokenizer:
    """The tokenizer of a model.

    Args:
        folder: that has the tokenizer's files; ``None`` for a model that has none.
        source: of the model, in words.
        chat_template: of the settings.

    Raises:
        RefusedError: a chat template was asked for, and there are no chats.
    """
    from server.text.template_process import template_process

    template_process().start()  # it imports what it needs meanwhile
    # Their import takes a second, in which the engine starts.
    from server.text.no_tokenizer import NoTokenizer
    from server.text.tokenizer import Tokenizer

    if folder is not None:
        tokenizer = Tokenizer(folder, chat_template)
        if not tokenizer.has_chat_template:
            template_process().close()
        return tokenizer
    template_process().close()
    if chat_template is not None:
        raise RefusedError(f"--chat-template: {source} has no tokenizer, so there are no chats; leave it out")
    log.warning("%s has no tokenizer: token ids are served, and no text", source)
    return NoTokenizer()


def warn_of_tokens(tokenizer: Tokenizer, vocabulary_size: int) -> None:
    """Says that some texts can't be prompts, which is no reason not to serve the others.

    Args:
        tokenizer: of the model.
        vocabulary_size: tokens that the model knows.
    """
    beyond = tokenizer.vocabulary_size - vocabulary_size
    if beyond > 0:
        log.warning(
            "the tokenizer has %d tokens that the model lacks, from %d on; prompts with them are refused",
            beyond,
            vocabulary_size,
        )
