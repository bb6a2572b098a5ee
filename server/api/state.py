"""The state of the server: loading, ready, draining or without an engine, and the model that it serves."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from google.protobuf.descriptor import Descriptor

from longspan.v1 import inference_pb2
from server.api import errors
from server.api.admission import Admission
from server.api.encoder_errors import task_not_served
from server.api.field_count import has_more_fields
from server.api.kv_log import KVLog
from server.api.limits import MOST_REQUEST_BYTES, limits, most_fields, received_bytes
from server.api.text_work import TextWork
from server.api.vector_bytes import VectorBytes
from server.encoder_messages import Task
from server.engine.ipc.link import EngineClient
from server.messages import Ready
from server.models.generation import Generation
from server.settings import Settings
from server.sizes import Sizes

if TYPE_CHECKING:
    from server.text.tokenizer import Tokenizer

Phase = Literal["loading", "ready", "draining", "dead"]

# When a client should try again. A draining server doesn't come back, but one behind the same name may.
_RETRY_SECONDS = 2.0
# A message that is larger can only be a request for a model, which is refused while there is none.
_BYTES_WITHOUT_MODEL = 64 << 10
# Parsing takes no longer than counting the fields of a message of no more bytes: half a millisecond at most.
_UNCOUNTED_BYTES = 64 << 10
# One conversation is rendered at a time, while others are tokenized.
_CHAT_THREADS, _MOST_CHATS = 4, 1024


@dataclass(frozen=True, slots=True)
class Served:
    """A model that answers requests.

    Attributes:
        name: in requests and metrics.
        source: where its weights came from.
        tokenizer: its text side.
        engine: its engine process, ready.
        ready: what the engine says it runs.
        generation: what ends its outputs, and how tokens are chosen where a request leaves that open.
    """

    name: str
    source: str
    tokenizer: Tokenizer
    engine: EngineClient
    ready: Ready
    generation: Generation

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The model's tasks: masks are filled where texts can spell them."""
        spelled = self.tokenizer.mask_token is not None
        return tuple(task for task in self.ready.tasks if spelled or task is not Task.FILL)

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt, at most."""
        info = self.ready.encoder_decoder
        return self.ready.context_length - 1 if info is None else info.source_length

    def check_task(self, task: Task) -> None:
        """Whether the model can do what a request asks for.

        Raises:
            ServiceError: it can do something else.
        """
        if task not in self.tasks:
            raise task_not_served(self.name, self.ready.architecture, task, self.tasks)


class ServerState:
    """One per server; the lifecycle changes it, the service reads it.

    Attributes:
        settings: in force.
        admission: the requests in flight.
        text_work: tokenizes long texts, and other work on these.
        chat_work: renders short conversations, which it hands to a process, and tokenizes them.
        vector_bytes: of encoders' answers with a vector for each token.
        kv_log: what becomes of the prefix cache's pages, if that is to be told by gRPC.
        phase: whether requests are answered, and if not, why.
        progress: while loading, what is being done, as part of a sentence.
        failure: why there is no engine, once it died.
        served: the model, from the first time it was ready.
        limits: what requests are held to.
        received_bytes: of the largest message that gRPC is to read.
        ready_since: monotonic time at which the server was first ready.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.admission = Admission(0)  # until the engine tells how many sequences run at once
        self.text_work = TextWork()
        self.chat_work = TextWork(_CHAT_THREADS, _MOST_CHATS)
        self.vector_bytes = VectorBytes()
        self.kv_log = KVLog() if settings.streams_kv_events else None
        self.phase: Phase = "loading"
        self.progress = "starting"
        self.failure = ""
        self.served: Served | None = None
        self.limits = inference_pb2.Limits(request_bytes=_BYTES_WITHOUT_MODEL)
        self.received_bytes = received_bytes(settings.max_request_bytes or MOST_REQUEST_BYTES)
        self.ready_since: float | None = None

    def hold_to(self, served: Served) -> None:
        """Requests get the limits of a model; what no setting gave is as the engine chose for its device."""
        ready = served.ready
        chosen = {name: getattr(ready, name) for name in Sizes._fields}
        self.settings = self.settings.model_copy(update=chosen)
        self.admission.limit = ready.max_running + self.settings.max_queue
        self.limits = limits(self.settings, ready, served.tokenizer.longest_token_bytes)
        self.received_bytes = received_bytes(self.limits.request_bytes)

    def set_ready(self, served: Served) -> None:
        """From now on ``served`` answers, within its limits."""
        self.hold_to(served)
        self.served = served
        self.phase = "ready"
        self.ready_since = self.ready_since or time.monotonic()

    def unavailable(self) -> errors.ServiceError:
        """Why requests are refused, whatever they ask for."""
        if self.phase == "dead":
            return errors.engine_dead(self.failure)
        if self.phase == "draining":
            return errors.unavailable(
                "DRAINING", "the server is shutting down and takes no new requests", _RETRY_SECONDS
            )
        return errors.unavailable(
            "LOADING", f"the server is loading its model ({self.progress}); try again soon", _RETRY_SECONDS
        )

    def cut_off(self) -> errors.ServiceError:
        """Why a request that was running when the server was told to end is not answered in full."""
        sentence = "the server shut down before the answer was complete; ask again"
        return errors.unavailable("DRAINING", sentence, _RETRY_SECONDS)

    def model(self, name: str) -> Served:
        """The model of this name; the empty name means the only one.

        Raises:
            ServiceError: it can't be asked now, or there is none.
        """
        if self.phase != "ready" or self.served is None:
            raise self.unavailable()
        if name and name != self.served.name:
            raise errors.unknown_model(name, self.served.name)
        return self.served

    def check_message(self, payload: bytes, descriptor: Descriptor) -> None:
        """Holds a message to the limits of its size before it is parsed.

        Args:
            payload: the message's bytes.
            descriptor: its type.

        Raises:
            ServiceError: it has too many bytes or fields, or there is no model yet that says how many.
        """
        size = len(payload)
        if size > self.limits.request_bytes:
            if self.served is None:
                raise self.unavailable()
            raise errors.request_too_large(size, self.limits.request_bytes)
        most = most_fields(self.limits)
        # A field takes two bytes at least.
        if size > max(2 * most, _UNCOUNTED_BYTES) and has_more_fields(payload, descriptor, most):
            raise errors.too_many_fields(most)
