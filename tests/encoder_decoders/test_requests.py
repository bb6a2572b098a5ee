"""What a request to an encoder-decoder says, before any model computes."""

from types import SimpleNamespace

import pytest

from longspan.v1 import inference_pb2, types_pb2
from server.api.beam_search import Beams, BeamSearch
from server.api.conversion import Plan
from server.api.languages import encoder_decoder_info
from server.encoder_messages import EncoderDecoderInfo
from server.messages import Sampling
from server.models.target import Target
from server.text.stop import StopStrings

TARGET = Target(EncoderDecoderInfo(100, 100), [2], min_tokens=6)


@pytest.mark.parametrize(("said", "least"), [({}, 6), ({"min_tokens": 0}, 0), ({"min_tokens": 9}, 9)])
def test_a_request_may_take_the_makers_least_length_back(said, least):
    request = inference_pb2.GenerateRequest(stop=types_pb2.StopConditions(**said))
    plan = Plan(request, 1, 0, Sampling(), StopStrings([], {}), [1], TARGET, [], None)
    (sequence,) = plan.sequences([1], [5, 6, 7], 200)
    assert sequence.min_tokens == least


def test_special_tokens_that_only_look_like_languages_are_none():
    """Blenderbot's."""
    special = {"__start__": 1, "__end__": 2, "__unk__": 3, "__fr__": 4, "de_DE": 5, "en_XX": 99}
    served = SimpleNamespace(
        generation=SimpleNamespace(target=TARGET),
        tokenizer=SimpleNamespace(special_tokens=special),
        ready=SimpleNamespace(vocabulary_size=50),
    )
    assert list(encoder_decoder_info(served).languages) == ["__fr__", "de_DE"]


def test_a_search_over_a_long_output_copies_only_beams_that_go_on():
    """A step of it runs among all other streams, in the server process."""
    stops = set(range(100))
    search = BeamSearch(Beams(2, 1.0, "full"), stops, 10_000)

    class Counted(list):
        copied = 0

        def __iter__(self):
            Counted.copied += 1
            return super().__iter__()

    following = {token: -float(token) for token in range(100, 100 + search.wanted)}
    search.advance([following])
    search.running = [beam._replace(tokens=Counted(beam.tokens)) for beam in search.running]
    search.advance([following, following])
    assert len(search.running) == 2
    assert Counted.copied <= 2
