"""The sequence of an encoder-decoder: its source as pages of their own, then the decoder's tokens."""

from __future__ import annotations

import hashlib
from array import array

import msgspec

from server.messages import Submit
from server.models.executors.base import filled


def laid_out(request: Submit, page_size: int) -> Submit:
    """The request whose prompt is its source, filled up to a page's end, and what the decoder begins with.

    Every key of a source's page depends on the whole source, since its tokens see each other. So the source
    is part of the salt, and equal sources alone share pages.

    Args:
        request: whose prompt is the source.
        page_size: tokens per page.
    """
    count = len(request.prompt)
    filler = [0] * (filled(count, page_size) - count)
    salt = hashlib.blake2b(array("I", request.prompt).tobytes(), key=request.salt[:64], digest_size=16)
    return msgspec.structs.replace(
        request, prompt=[*request.prompt, *filler, *request.start], source=count, salt=salt.digest()
    )
