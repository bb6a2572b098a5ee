"""The size of one sequence's KV cache, and how many such sequences fit."""

from __future__ import annotations

from collections.abc import Sequence

from loadtest.evaluation.types import Memory
from loadtest.greedy import GREEDY
from longspan import Client, DeadlineError, LongspanError, UnavailableError

_ATTEMPTS = 3
_PAGES = 2  # that the output goes through, so that every offset in a page occurs


def memory(client: Client, deployment: str, ids: Sequence[int], kv_memory: int = 0) -> Memory:
    """Continues a sequence and watches the pages that it holds.

    Pages that the prompt takes while it is computed don't count: a pattern that frees pages has freed them
    when the first token comes.

    Args:
        client: of the deployment's server, which does nothing else.
        deployment: its name.
        ids: tokens of the whole sequence; it is continued before its end, so that it has this length then.
        kv_memory: bytes of the KV cache that ``fits`` is counted for; 0 for the server's own.

    Returns:
        The row; with the server's sentence as ``error`` where it refuses the prompt, or why nothing was seen.

    Raises:
        ValueError: there are too few tokens.
        longspan.UnavailableError: the server has ended.
    """
    try:
        load = client.server_info().load
        output = _PAGES * load.page_size + 2
        if len(ids) <= output:
            raise ValueError(
                f"a sequence of {len(ids)} tokens can't be watched for {output}; take a longer one"
            )
        prompt = ids[: len(ids) - output]
        held = next(filter(None, (pages_held(client, prompt, output) for _ in range(_ATTEMPTS))), 0)
    except (UnavailableError, DeadlineError):
        raise
    except LongspanError as error:
        return Memory(deployment, len(ids), error=str(error))
    if not held:
        why = f"this machine is too busy: {_ATTEMPTS} times the sequence was over before it could be watched"
        return Memory(deployment, len(ids), error=why)
    # Page 0 is never allocated.
    page_bytes = load.kv_bytes / (load.pages_total + 1)
    pages = int(kv_memory / page_bytes) - 1 if kv_memory else load.pages_total
    return Memory(deployment, len(ids), held * page_bytes, max(0, pages // held))


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
