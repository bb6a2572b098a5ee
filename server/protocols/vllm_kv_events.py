"""``SubscribeKvEvents`` of ``VllmEngine``: the KV cache's events as that protocol has them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc
from smg_grpc_proto.generated import common_pb2 as common

from server.access.identities import Identity
from server.api.errors import ServiceError, refusal
from server.api.kv_log import Batch, KVLog, NotKeptError
from server.kv_messages import BlockRemoved, BlockStored, Event


def check_allowed(identity: Identity) -> None:
    """Whether an identity may read the tokens of all prompts.

    Raises:
        ServiceError: it may not.
    """
    if not identity.kv_events:
        raise refusal(
            grpc.StatusCode.PERMISSION_DENIED,
            "KV_EVENTS_DENIED",
            "events of the KV cache tell the tokens of all prompts; an identity that may read them has "
            "kv_events = true in --identities",
        )


def switched_off() -> ServiceError:
    """The server was started without them."""
    return refusal(
        grpc.StatusCode.UNIMPLEMENTED,
        "KV_EVENTS_OFF",
        "this server does not answer SubscribeKvEvents; with --kv-events it would",
    )


async def batches(log: KVLog, start: int) -> AsyncGenerator[common.KvEventBatch, None]:
    """The stream: from a batch on, that one included, or with 0 the state now and what follows.

    Args:
        log: what is followed.
        start: the request's ``start_sequence_number``.

    Raises:
        ServiceError: OUT_OF_RANGE where the first batch is not kept, DATA_LOSS where a later one is not,
            since the subscriber is too slow. The gateway begins anew after either.
    """
    begun = False
    try:
        async with aclosing(log.follow(start)) as found:
            async for batch in found:
                yield _message(batch)
                begun = True
    except NotKeptError as error:
        if begun:
            raise refusal(
                grpc.StatusCode.DATA_LOSS,
                "KV_EVENTS_BEHIND",
                "batches that come next are not kept any more; read faster, and begin with number 0",
            ) from error
        raise refusal(
            grpc.StatusCode.OUT_OF_RANGE,
            "KV_EVENTS_NOT_KEPT",
            f"start_sequence_number: batch {start} is not kept, or of a server before this one; begin with 0",
        ) from error


def _message(batch: Batch) -> common.KvEventBatch:
    message = common.KvEventBatch(sequence_number=batch.number, timestamp=batch.time, dp_rank=0)
    if batch.part is None:
        for number, event in enumerate(batch.events, start=batch.first_event + 1):
            message.events.append(_event(event, number))
        return message
    message.snapshot.index, message.snapshot.count = batch.part, batch.parts
    message.snapshot.blocks = batch.pages
    for event in batch.events:
        message.events.append(_event(event, 0))
    return message


def _event(event: Event, number: int) -> common.KvCacheEvent:
    match event:
        case BlockStored(names, before, tokens, size):
            stored = common.KvBlocksStored(
                blocks=[
                    common.KvBlock(
                        block_hash=_signed(name),
                        token_ids=tokens[index * size : (index + 1) * size],
                        block_size=size,
                    )
                    for index, name in enumerate(names)
                ],
                parent_block_hash=None if before is None else _signed(before),
            )
            return common.KvCacheEvent(event_id=number, stored=stored)
        case BlockRemoved(names):
            removed = common.KvBlocksRemoved(block_hashes=map(_signed, names))
            return common.KvCacheEvent(event_id=number, removed=removed)
        case _:
            return common.KvCacheEvent(event_id=number, cleared=common.KvCacheCleared())


def _signed(name: int) -> int:
    """A page's name as the protocol has it, in 64 bits with a sign."""
    return name - (1 << 64) if name >> 63 else name
