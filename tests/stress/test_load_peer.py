"""A load on a peer of another make: llama.cpp's server, beside Longspan's, in the same table."""

import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from loadtest.load import examine
from loadtest.load.drawing import drawing, known
from loadtest.load.measure import measure
from loadtest.load.plan import Plan
from loadtest.load.rows import rows
from loadtest.load.targets import Endpoint
from loadtest.load.types import ClosedLoop, Wanted
from loadtest.servers import serve
from longspan import Client
from tests.stress.llama_cpp import LlamaCpp

pytestmark = [pytest.mark.stress, pytest.mark.timeout(900)]


@pytest.mark.parametrize("count_here", [True, False])
def test_both_get_the_same_prompts_and_their_tokens_are_counted(default_model, count_here):
    file = Path(json.loads((default_model / "longspan.json").read_text())["gguf"])
    with (
        LlamaCpp(file) as peer,
        serve() as address,
        Client(address.host, address.port) as client,
        open(os.devnull, "w") as nowhere,
    ):
        tokenizer = str(default_model) if count_here else None
        endpoint = Endpoint(f"{peer.address}/v1", str(file), "llama.cpp", tokenizer=tokenizer)
        told = examine.told(endpoint)
        assert (told.context, told.vocabulary) == (1024, client.model_info().vocabulary_size)
        wanted = Wanted("fixed", prompt_tokens=40, output_tokens=24)
        workload, draw = drawing(wanted, known(client, endpoint, told))
        examine.try_out(endpoint, draw(1, 0)[0].turns[0], 60.0)
        plan = Plan(
            *(address.host, address.port, address.metrics_url, workload, draw, [ClosedLoop(1)]),
            *(3, 1, 1, 11, None, None),
            repeats=2,
            endpoint=endpoint,
        )
        found = measure(plan, Console(file=nowhere))
    assert [row.label for row in rows(found)] == ["1 user, 40/24", "1 user, 40/24, llama.cpp"]
    for run in found.runs:
        assert run.summary.failed == {}, [each["error"] for each in run.requests]
        assert run.summary.prompt_tokens == 3 * 40
        assert run.summary.ttft.count == run.summary.tpot.count == 3
        if run.target == "llama.cpp":
            # Cut anew, a text of odd words can have a few tokens more or less than it was made of.
            assert run.summary.output_tokens == pytest.approx(3 * 24, rel=0.2 if count_here else 0)
            assert run.summary.told_tokens == (3 * 24 if count_here else 0)
        else:
            assert run.summary.output_tokens == 3 * 24
