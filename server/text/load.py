"""A model's tokenizer, or what stands for one that it lacks."""

from __future__ import annotations

import logging
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from server.errors import RefusedError, quoted

if TYPE_CHECKING:
    from server.text.tokenizer import Tokenizer

log = logging.getLogger("longspan.server")

_INSTEAD = "put the model's own tokenizer there, or move its files away: then the model serves token ids"
_TRIED = 256


def load_tokenizer(folder: Path | None, source: str, chat_template: str | None) -> Tokenizer:
    """The tokenizer of a model.

    Args:
        folder: that has the tokenizer's files; ``None`` for a model that has none.
        source: of the model, in words.
        chat_template: of the settings.

    Raises:
        RefusedError: a chat template was asked for, and there are no chats.
    """
    from server.text.chat_source import may_have_template
    from server.text.template_process import template_process

    if folder is not None and may_have_template(folder, chat_template):
        template_process().start()  # it imports what it needs meanwhile
    # Their import takes a second, in which the engine starts.
    from server.text.no_tokenizer import NoTokenizer
    from server.text.tokenizer import Tokenizer

    if folder is not None:
        try:
            tokenizer = Tokenizer(folder, chat_template)
        except RefusedError:
            raise
        except Exception as error:  # files that are read without a complaint can still contradict each other
            raise RefusedError(
                f"the tokenizer of {source} can't be used ({type(error).__name__}: {error}); {_INSTEAD}"
            ) from error
        if not tokenizer.has_chat_template:
            template_process().close()
        return tokenizer
    if chat_template is not None:
        raise RefusedError(f"--chat-template: {source} has no tokenizer, so there are no chats; leave it out")
    log.warning("%s has no tokenizer: token ids are served, and no text", source)
    return NoTokenizer()


def check_tokens(tokenizer: Tokenizer, vocabulary_size: int, most: int | None = None) -> None:
    """Tries the tokenizer, and says where some texts can't be prompts: the others can.

    A mask that no text can have is no mask from then on.

    Args:
        tokenizer: of the model.
        vocabulary_size: tokens that the model knows.
        most: tokens that a text may have; ``None`` for any number.

    Raises:
        RefusedError: no text becomes tokens of the model, or so few, so that every request would fail.
    """
    if tokenizer.has_text:
        _try(tokenizer, vocabulary_size, most)
        try_mask(tokenizer, vocabulary_size)
    beyond = tokenizer.vocabulary_size - vocabulary_size
    if beyond > 0:
        log.warning(
            "the tokenizer has %d tokens that the model lacks, from %d on; prompts with them are refused",
            beyond,
            vocabulary_size,
        )


def _try(tokenizer: Tokenizer, vocabulary_size: int, most: int | None) -> None:
    reason, shortest = "no text becomes tokens that the model knows", 0
    # Of some vocabularies the first thousand are special.
    ordinary = (token for token in range(vocabulary_size) if token not in tokenizer.special_token_ids)
    tried = list(islice(ordinary, _TRIED))
    for token in tried:
        try:
            ids = tokenizer.encode(tokenizer.token(token), add_special_tokens=False)
            whole = tokenizer.encode(tokenizer.token(token))
            tokenizer.decode_known([token])
        except Exception as error:  # the tokenizers library raises nothing narrower
            reason = str(error)
            continue
        if not ids or max(ids) >= vocabulary_size:
            continue
        if max(whole) >= vocabulary_size:
            reason = (
                f"it adds token {max(whole)} to every text (post_processor of tokenizer.json, or bos_token "
                f"and eos_token of tokenizer_config.json), and the model has none from {vocabulary_size} on"
            )
        elif most is not None and len(whole) > most:
            shortest = min(len(whole), shortest or len(whole))
            reason = (
                f"texts have {shortest} tokens at least with those that it adds, and the context has room "
                f"for {most} (max_position_embeddings of config.json, or --max-context)"
            )
        else:
            return
    if tried:
        raise RefusedError(f"the model's tokenizer can't be used: {reason}; {_INSTEAD}")


def try_mask(tokenizer: Tokenizer, vocabulary_size: int) -> None:
    """Takes a tokenizer's mask away, with a warning, if no text can spell it as a token of the model."""
    mask = tokenizer.mask_token
    if mask is None:
        return
    token = tokenizer.special_tokens[mask]
    with suppress(Exception):  # the tokenizers library raises nothing narrower
        if token < vocabulary_size and token in tokenizer.encode(mask):
            return
    log.warning("texts can't spell the tokenizer's mask, %s, as a token that the model knows", quoted(mask))
    tokenizer.mask_token = None
