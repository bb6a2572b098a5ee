"""What a request to an encoder-decoder says, before any model computes."""

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from longspan.v1 import inference_pb2, types_pb2
from server.api.beams import BeamRoom, beams_of
from server.api.conversion import Plan, plan
from server.api.errors import ServiceError
from server.api.languages import encoder_decoder_info
from server.api.limits import limits
from server.api.state import Served
from server.encoder_messages import EncoderDecoderInfo
from server.messages import Beams, Sampling, StopTexts
from server.models.generation import Generation
from server.models.target import Target
from server.settings import Settings
from server.text.stop import StopStrings
from tests.api.fake_engine import READY, VOCABULARY

TARGET = Target(EncoderDecoderInfo(100, 100), [2], min_tokens=6)


@pytest.mark.parametrize(("said", "least"), [({}, 6), ({"min_tokens": 0}, 0), ({"min_tokens": 9}, 9)])
def test_a_request_may_take_the_makers_least_length_back(said, least):
    request = inference_pb2.GenerateRequest(stop=types_pb2.StopConditions(**said))
    planned = Plan(request, 1, 0, Sampling(), StopStrings([], {}), [1], TARGET, [], None)
    (sequence,) = planned.sequences([1], [5, 6, 7], 200)
    assert sequence.min_tokens == least


@pytest.mark.parametrize(("said", "refused"), [({}, True), ({"min_tokens": 0}, False)])
def test_stop_tokens_and_bans_leave_one_before_the_makers_least_length(said, refused):
    target = Target(TARGET.info, [2], min_tokens=6, banned=range(8, VOCABULARY))
    ready = msgspec.structs.replace(READY, encoder_decoder=TARGET.info)
    tokenizer: Any = SimpleNamespace(special_tokens={}, has_text=True, languages=None)
    engine: Any = None
    served = Served("m", "m", tokenizer, engine, ready, Generation([2], Sampling(), target))
    stop = types_pb2.StopConditions(stop_token_ids=range(8), **said)
    request = inference_pb2.GenerateRequest(token_ids={"ids": [5]}, stop=stop)
    if refused:
        with pytest.raises(ServiceError, match=r"leave no token to choose before min_tokens"):
            plan(request, served, limits(Settings(), ready, 8))
    else:
        assert plan(request, served, limits(Settings(), ready, 8)).stop_token_ids == [*range(8)]


def test_the_engine_learns_of_stop_strings_of_beams():
    request = inference_pb2.GenerateRequest(
        stop={"stop_strings": ["x"], "min_tokens": 3}, keep_special_tokens=True, beam_search={"num_beams": 2}
    )
    assert beams_of(request).stop == StopTexts(["x"], True, 3)
    request.forced_token_ids.extend([7] * 4)
    assert beams_of(request).stop.min_tokens == 5
    request.stop.ClearField("stop_strings")
    assert beams_of(request).stop is None


def test_a_search_has_the_makers_penalties_and_not_their_temperature():
    request = inference_pb2.GenerateRequest(beam_search={"num_beams": 2})
    theirs = Sampling(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.5)
    planned = Plan(request, 1, 0, theirs, StopStrings([], {}), [1], TARGET, [], beams_of(request))
    (search,) = planned.sequences([1], [5, 6, 7], 200)
    assert search.sampling == Sampling(temperature=0.0, repetition_penalty=1.5)


def test_special_tokens_that_only_look_like_languages_are_none():
    """Blenderbot's."""
    special = {"__start__": 1, "__end__": 2, "__unk__": 3, "__fr__": 4, "de_DE": 5, "en_XX": 99}
    served = SimpleNamespace(
        generation=SimpleNamespace(target=TARGET),
        tokenizer=SimpleNamespace(special_tokens=special),
        ready=SimpleNamespace(vocabulary_size=50),
    )
    assert list(encoder_decoder_info(served).languages) == ["__fr__", "de_DE"]


@pytest.mark.parametrize(("said", "tokens"), [({}, 28), ({"max_tokens": 28}, 28), ({"max_tokens": 29}, None)])
def test_beams_have_to_have_room_at_once(said, tokens):
    """Of 20 pages of 8 tokens, 4 beams share 2 of a prompt of 20 tokens and have 4 of their own."""
    request = inference_pb2.GenerateRequest(stop=types_pb2.StopConditions(**said))
    beams, room = Beams(count=4), BeamRoom(8, 20, 18)
    plan = Plan(request, 3, 0, Sampling(), StopStrings([], {}), [1], None, [], beams, room)
    if tokens is None:
        with pytest.raises(ServiceError, match="is 4; the KV cache has room for 28 output tokens of each"):
            plan.kv_tokens(20, 100, shared=True)
        return
    (search,) = plan.sequences([7, 8, 9], [5] * 20, 100)
    assert (search.ids, search.max_tokens) == ([7, 8, 9], tokens)
