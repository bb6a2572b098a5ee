"""From where on a request's stop strings end an output."""

from __future__ import annotations

from longspan.v1 import inference_pb2


def stops_from(request: inference_pb2.GenerateRequest) -> int:
    """How many tokens an output has at least when a stop string ends it: none within forced tokens does."""
    return max(request.stop.min_tokens, len(request.forced_token_ids) + 1)
