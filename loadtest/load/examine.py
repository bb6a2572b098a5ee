"""Asks an endpoint before it is measured, so that refusals come at once."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2

from loadtest.load.drawing import Known
from loadtest.load.over_http import http_client, http_sender
from loadtest.load.targets import Endpoint, EndpointError
from loadtest.load.types import Turn
from loadtest.measuring.records import Record

_LIST_SECONDS = 10.0
_NAMES = 8
_TOKENS = 4


def told(endpoint: Endpoint) -> Known:
    """Facts about the endpoint's model from its list of models, as far as it has them.

    Raises:
        EndpointError: no server answers, or its list lacks the model.
    """
    return asyncio.run(_told(endpoint))


def try_out(endpoint: Endpoint, turn: Turn, patience: float) -> None:
    """Sends one short request.

    Args:
        endpoint: to be asked.
        turn: one as those that will be sent; its output is cut to 4 tokens.
        patience: seconds that it may take.

    Raises:
        EndpointError: it failed; says how.
    """
    try:
        record = asyncio.run(asyncio.wait_for(_tried(endpoint, turn), patience))
    except TimeoutError:
        raise EndpointError(f"{endpoint.url} did not answer a request within {patience:g} seconds") from None
    if record.error:
        raise EndpointError(f"{endpoint.url} can't be measured: {record.error}")


async def _told(endpoint: Endpoint) -> Known:
    async with http_client(endpoint) as client:
        url = endpoint.url + "/models"
        try:
            response = await client.get(url, timeout=_LIST_SECONDS)
        except httpx2.HTTPError as error:
            raise EndpointError(
                f"no server answers at {endpoint.url}: {error or type(error).__name__}; look at --endpoint"
            ) from error
    try:
        found = response.json()
    except ValueError:
        return Known()
    models = found.get("data") if response.status_code == 200 and isinstance(found, dict) else None
    if not isinstance(models, list) or not models:
        return Known()  # not every server lists its models; the request that is tried will tell
    known = {model.get("id"): model for model in models if isinstance(model, dict)}
    if endpoint.model not in known:
        names = ", ".join(str(name) for name in list(known)[:_NAMES])
        raise EndpointError(
            f"{endpoint.url} has no model {endpoint.model!r}; name one with --endpoint-model: {names}"
        )
    return _of(known[endpoint.model])


def _of(model: dict[str, Any]) -> Known:
    """vLLM and SGLang call the context ``max_model_len``; llama.cpp has its facts in ``meta``."""
    meta = model.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    counts = [meta.get("n_vocab"), model.get("max_model_len") or meta.get("n_ctx")]
    vocabulary, context = (count if isinstance(count, int) and count > 0 else 0 for count in counts)
    return Known(vocabulary, context)


async def _tried(endpoint: Endpoint, turn: Turn) -> Record:
    record = Record(0, 0, 0.0, 0.0, expected_tokens=_TOKENS)
    async with http_sender(endpoint) as sender:
        await sender.send(Turn(turn.prompt, min(_TOKENS, turn.output_tokens)), record)
    return record
