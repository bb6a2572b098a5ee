"""How much of the KV cache a sequence holds, by a server whose answers are known."""

from loadtest.evaluation.memory import memory, pages_held
from longspan import Client
from longspan.v1 import inference_pb2 as pb
from tests.scripted import Mirror, serving


def test_pages_are_counted_while_tokens_come(monkeypatch):
    held = iter([9, 5, 7, 6, 99])

    def info(self, request, context):
        return pb.GetServerInfoResponse(load=pb.Load(pages_used=next(held)))

    monkeypatch.setattr(Mirror, "GetServerInfo", info)
    with serving() as server, Client(port=server.port, timeout=20) as client:
        assert pages_held(client, [97] * 8, 6) == 9
    assert next(held) == 99


def test_a_sequence_that_is_over_before_it_is_seen_is_watched_again(monkeypatch):
    held = iter([0] * 40 + [4] * 1000)

    def info(self, request, context):
        return pb.GetServerInfoResponse(
            load=pb.Load(pages_used=next(held), pages_total=9, page_size=4, kv_bytes=1000)
        )

    monkeypatch.setattr(Mirror, "GetServerInfo", info)
    with serving() as server, Client(port=server.port, timeout=20) as client:
        seen = [memory(client, "full", [97] * 30) for _ in range(2)]
        assert "too busy" in seen[0].error
        assert (seen[1].bytes, seen[1].fits) == (400, 2)
