"""One request to an encoder, from its admission to its results."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from longspan.v1 import types_pb2
from server.api import encoder_errors
from server.api.in_flight import InFlight
from server.api.prompt import THREAD_CHARACTERS
from server.api.state import Served, ServerState
from server.api.vector_bytes import Holder
from server.encoder_messages import Encode, Pooling
from server.messages import FinishReason, SequenceOutput
from server.observe.metrics import Metrics
from server.observe.request import RequestRecord
from server.text.encoder_texts import EncoderText

# Results taken at once from the link.
_MOST_TAKEN = 64


class Encoded(NamedTuple):
    """The results of a request.

    Attributes:
        texts: as the engine had them.
        outputs: one for each.
        usage: tokens consumed.
        timings: where the time went.
    """

    texts: list[EncoderText]
    outputs: list[SequenceOutput]
    usage: types_pb2.Usage
    timings: types_pb2.Timings


class Encoding(InFlight):
    """A request in flight, which ``run`` runs."""

    def __init__(self, holder: Holder, state: ServerState, metrics: Metrics) -> None:
        super().__init__(state, metrics)
        self._holder = holder

    def abort(self) -> None:
        """Ends the request with ABORTED: a part of its results is no answer."""
        self.fail(encoder_errors.aborted())

    async def run(
        self,
        served: Served,
        tokenize: Callable[[], list[EncoderText]],
        count: int,
        characters: int,
        template: Encode,
    ) -> Encoded:
        """Tokenizes, submits and waits.

        The engine forgets the request as soon as this ends, for whatever reason.

        Args:
            served: the model.
            tokenize: gives the texts.
            count: how many.
            characters: of all texts to tokenize.
            template: what to do with each text; its ``id``, ``turn`` and tokens are replaced.

        Raises:
            ServiceError: the request can't be answered, or no longer.
        """
        account, quota = self._account, self._caller.quota
        with self._state.admission.admit(self._caller, self._request_id, self, count):
            texts = await self._beside(tokenize, characters)
            if self._error is not None:
                raise self._error
            tokens = sum(len(text.tokens) for text in texts)
            self._state.vector_bytes.hold(_vector_bytes(served, template, tokens), self._holder)
            quota.spend(tokens)
            record = account.record = RequestRecord(self._metrics, 0, account.arrival, quota.spend)
            ids = served.engine.new_ids(count)
            submits = [
                msgspec.structs.replace(template, id=id_, turn=turn, tokens=text.tokens, types=text.types)
                for turn, (id_, text) in enumerate(zip(ids, texts, strict=True))
            ]
            outputs = await self._outputs(served, submits, record, tokens)
            timings = record.complete()
            account.finish = FinishReason.STOP.value
            return Encoded(texts, [outputs[id_] for id_ in ids], record.usage(), timings)

    async def _beside(self, work: Callable[[], list[EncoderText]], characters: int) -> list[EncoderText]:
        """Tokenizes, in a thread where it would hold up other requests."""
        if characters <= THREAD_CHARACTERS:
            return work()
        return await self._state.text_work.run(work, characters)

    async def _outputs(
        self, served: Served, submits: list[Encode], record: RequestRecord, tokens: int
    ) -> dict[int, SequenceOutput]:
        outputs: dict[int, SequenceOutput] = {}
        with self._in_engine():
            stream = self._stream = served.engine.submit(submits)
            self._account.submitted = True
            while taken := await stream.take(_MOST_TAKEN):
                if not outputs:
                    record.begin(tokens, taken[0][0])
                for output, _ in taken:
                    if output.finish is FinishReason.FAILED:
                        raise RuntimeError(
                            f"the engine could not compute text {output.id}; its log says more"
                        )
                    outputs[output.id] = output
        return outputs


def _vector_bytes(served: Served, template: Encode, tokens: int) -> int:
    """Bytes of the vectors of all tokens, where these are asked for."""
    if template.pooling is not Pooling.NONE:
        return 0
    assert served.ready.encoder is not None
    return 4 * served.ready.encoder.embedding_size * tokens
