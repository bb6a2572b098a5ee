"""The operator's text as blocks of tokens, of which the last of each file are held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from loadtest import texts

_HELD_OUT = 0.1
_LEAST = 20  # blocks


def blocks(tokenizer: Any, files: Sequence[str], context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks for training, and those that are held out: the last tenth of each file.

    Args:
        tokenizer: the teacher's.
        files: of text.
        context: tokens of a block.

    Returns:
        Token ids, each ``[blocks, context]``.

    Raises:
        OSError: a file can't be read.
        ValueError: a file is not text, or all have too little of it.
    """
    train, held_out = [], []
    for file in files:
        ids = tokenizer(texts.read(Path(file)), add_special_tokens=False, verbose=False)["input_ids"]
        whole = torch.tensor(ids[: len(ids) // context * context]).reshape(-1, context)
        cut = len(whole) - max(1, round(len(whole) * _HELD_OUT)) if len(whole) > 1 else len(whole)
        train.append(whole[:cut])
        held_out.append(whole[cut:])
    both = torch.cat(train), torch.cat(held_out)
    if len(both[0]) + len(both[1]) < _LEAST or len(both[1]) < 2:  # an interval takes two
        raise ValueError(
            f"--text has {len(both[0]) + len(both[1])} blocks of {context} tokens; give at least {_LEAST}, "
            "better thousands"
        )
    return both
