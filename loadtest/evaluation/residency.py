"""How much of the KV cache one sequence holds while it is being continued."""

from __future__ import annotations

from collections.abc import Sequence

from loadtest.greedy import GREEDY
from longspan import Client


def pages_held(client: Client, ids: Sequence[int], output_tokens: int) -> int:
    """The most pages that the server's running sequences held while ``output_tokens`` were generated.

    Args:
        client: of a server that does nothing else.
        ids: token ids of the prompt; pages are counted from the second output token on, when the last of
            the prompt's have been freed.
        output_tokens: to generate; more than 2, and more than a page holds, so that every offset in a page is
            met.

    Returns:
        Pages; 0 if the sequence was over each time that the server was asked, as on a machine so busy that
        all tokens are there before the first is read.

    Raises:
        LongspanError: the server cannot take the prompt.
    """
    held = [0]
    with client.stream(ids, max_tokens=output_tokens, ignore_eos=True, **GREEDY) as stream:
        seen = 0
        for delta in stream:
            seen += len(delta.token_ids)
            if 2 <= seen < output_tokens:
                held.append(client.server_info().load.pages_used)
    return max(held)
