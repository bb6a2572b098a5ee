"""``python -m loadtest.direct.growth`` with real engines of a tiny model, and the command itself."""

import json
from dataclasses import replace

import msgspec
import pytest
import torch

from attention.patterns.sparse import PATTERNS
from loadtest.direct.growth.__main__ import main
from loadtest.direct.growth.in_engine import decode, survey
from loadtest.direct.growth.types import Plan, Point, Survey
from loadtest.direct.settings import read_settings
from server.errors import RefusedError
from tests.models_zoo import CONTEXT, save_tiny

PLAN = Plan((64, 256), (1, 2), 2, 6, (), 60.0, ())


def surveyed(plan):
    ((name, found),) = survey(plan)
    assert name == "survey"
    return msgspec.json.decode(found, type=Survey)


@pytest.fixture(scope="module", autouse=True)
def threads():
    """An engine sets their number for its whole process, which is this one here."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny("llama", tmp_path_factory.mktemp("growth") / "llama"))


def test_by_default_all_backends_and_patterns_are_tried(folder):
    found = surveyed(replace(PLAN, arguments=("--model", folder, "--threads", "1")))
    names = [variant.name for variant in found.variants]
    assert names[0] == "full"
    assert set(names) >= {"full", "flash", "xformers", "sliding_window", *PATTERNS} - {"full attention"}
    refusals = {variant.name: variant.refusal for variant in found.variants}
    assert "xformers" in refusals["xformers"]
    assert refusals["full"] is refusals["sliding_window"] is refusals["topk"] is None
    assert found.contexts == PLAN.contexts
    assert found.notes == ()


def test_every_point_has_room_and_no_more_memory_is_taken_than_that(folder):
    plan = replace(
        PLAN,
        backends=("sliding_window window=32",),
        arguments=("--model", folder, "--threads", "1", "--max-batch-tokens", "64"),
    )
    found = surveyed(plan)
    total = {}
    for each in found.variants:
        for point in plan.points:
            told = dict(decode(each, found.folder, point, plan.steps, 0))
            assert told.keys() == {"tpot", "pages_read", "pages_held"}
            assert all(value > 0 for value in told.values())
        total[each.name] = read_settings(each.arguments).kv_memory
    assert total["sliding_window window=32"] < total["full"]
    told = dict(decode(found.variants[0], found.folder, Point(256, 2), plan.steps, 0))
    assert told.keys() == {"no room"}
    assert "raise --kv-memory" in told["no room"]


def test_beyond_the_models_own_context_its_positions_are_stretched(folder):
    shared = ("--model", folder, "--threads", "1")
    beyond = replace(PLAN, contexts=(64, 3 * CONTEXT), backends=("full",), arguments=shared)
    found = surveyed(beyond)
    assert found.contexts == beyond.contexts
    assert "--rope-scaling yarn" in found.notes[0]
    settings = read_settings(found.variants[0].arguments)
    assert settings.rope_scaling == "yarn"
    assert float(settings.rope_option["factor"]) == 3.125
    assert settings.max_context == 3 * CONTEXT + beyond.steps + 2
    assert "tpot" in dict(decode(found.variants[0], found.folder, Point(3 * CONTEXT, 1), 1, 0))
    # The user's own argument stays.
    own = (*shared, "--rope-scaling", "linear", "--rope-option", "factor=4")
    found = surveyed(replace(beyond, arguments=own))
    assert found.notes == ()
    assert read_settings(found.variants[0].arguments).rope_scaling == "linear"


def test_contexts_that_a_model_without_rotary_positions_lacks_are_left_out(tmp_path):
    arguments = ("--model", str(save_tiny("gpt2", tmp_path / "gpt2")), "--threads", "1")
    plan = replace(PLAN, contexts=(64, 2 * CONTEXT), backends=("full",), arguments=arguments)
    found = surveyed(plan)
    assert found.contexts == (64,)
    assert f"beyond the model's own {CONTEXT} tokens are left out" in found.notes[0]
    with pytest.raises(RefusedError, match="no rotary embedding"):
        surveyed(replace(plan, contexts=(2 * CONTEXT,)))


def test_memory_that_the_machine_lacks_is_a_sentence(folder, monkeypatch):
    monkeypatch.setattr("loadtest.direct.growth.in_engine.available_bytes", lambda device: 1 << 16)
    found = surveyed(replace(PLAN, arguments=("--model", folder, "--threads", "1"), backends=("full",)))
    assert "give shorter --contexts or fewer --streams" in found.variants[0].refusal


def test_the_command(tmp_path, tiny_packed, monkeypatch, capsys):
    command = ["growth", "--contexts", "256,512", "--streams", "1,2"]
    command += ["--steps", "2", "--rounds", "2", "--backends", "sliding_window window=124", "xformers"]
    command += ["--json", str(tmp_path / "growth.json"), "--html", str(tmp_path / "growth.html")]
    command += ["--svg", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*command, "--", *tiny_packed])
    code, told = main(), capsys.readouterr()
    assert code == 0, told.err
    assert "sliding_window window=124" in told.out
    assert "! xformers: " in told.out
    result = json.loads((tmp_path / "growth.json").read_text())
    read = {
        (each["deployment"], each["load"]): each["figures"]["pages_read"] for each in result["measurements"]
    }
    layers = result["survey"]["model"]["layers"]
    assert read["full", "256 tokens x 1"] == layers * (256 // 16 + 1)
    assert read["full", "512 tokens x 1"] == layers * (512 // 16 + 1)
    assert read["full", "256 tokens x 2"] == 2 * read["full", "256 tokens x 1"]
    window = "sliding_window window=124"
    assert read[window, "512 tokens x 1"] == read[window, "256 tokens x 1"] < read["full", "256 tokens x 1"]
    assert all(each["figures"]["tpot"] > 0 for each in result["measurements"])
    assert {each["round"] for each in result["measurements"] if each["deployment"] == window} == {0, 1}
    assert (tmp_path / "growth.html").read_text().count("<figure") == 2
    for name in ("context", "streams"):
        assert (tmp_path / f"growth-{name}.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--", "--attention", "full"], "give backends by --backends"),
        (["--budget", "5"], "5 is not a duration of at least 30 seconds; write it like 90s, 5m or 1h30m"),
        (["--svg", "/nowhere/at/all"], "there is no folder /nowhere/at/all; make it first"),
    ],
)
def test_contradictory_arguments_are_refused(monkeypatch, capsys, arguments, sentence):
    monkeypatch.setattr("sys.argv", ["growth", *arguments])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    assert sentence in capsys.readouterr().err
