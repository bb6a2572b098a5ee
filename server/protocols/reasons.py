"""Why an output ended, in the words that other protocols share with OpenAI's."""

from __future__ import annotations

from longspan.v1 import types_pb2

REASONS = {
    types_pb2.FINISH_REASON_STOP: "stop",
    types_pb2.FINISH_REASON_LENGTH: "length",
    types_pb2.FINISH_REASON_ABORTED: "abort",
}
