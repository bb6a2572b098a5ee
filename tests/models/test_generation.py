"""Reading of generation_config.json and of the places that name end-of-sequence tokens."""

import json
import logging

import msgspec
import numpy as np
import pytest
import transformers

from server.messages import Sampling
from server.models.generation import read_generation
from tests.api.fake_engine import CONTEXT, READY, VOCABULARY

TOKENS = {"<|end|>": 7, "2": 50, "far": VOCABULARY}


@pytest.fixture
def read(tmp_path, caplog):
    """Reads a folder of these files; gives what is found, and what was logged."""

    def _read(generation=None, config=None, eos_token=None, recommended=()):
        for name, content in (("generation_config.json", generation), ("config.json", config)):
            if content is not None:
                text = content if isinstance(content, str) else json.dumps(content)
                (tmp_path / name).write_text(text)
        caplog.clear()
        with caplog.at_level(logging.INFO, "longspan"):
            found = read_generation(
                tmp_path,
                READY,
                eos_token=eos_token,
                token_id=TOKENS.get,
                recommended=None if recommended is None else dict(recommended),
            )
        return found, caplog.text

    return _read


@pytest.mark.parametrize(
    ("value", "ids"),
    [
        (2, [2]),
        ([9, 2, 2], [2, 9]),
        ([[2], 9], [2, 9]),
        (0, [0]),
        ("<|end|>", [7]),
        (["<|end|>", 3], [3, 7]),
        ("12", [12]),  # no token, but a number
        ("2", [50]),  # a token
    ],
)
def test_tokens_that_end_an_output(read, value, ids):
    found, log = read({"eos_token_id": value})
    assert found.eos_token_ids == ids
    assert "WARNING" not in log
    assert read(None, {"eos_token_id": value})[0].eos_token_ids == ids
    assert read(None, {"text_config": {"eos_token_id": value}})[0].eos_token_ids == ids


@pytest.mark.parametrize("value", [None, -1, [], [-1]])
def test_no_such_token_is_said(read, value):
    found, log = read({"eos_token_id": value})
    assert found.eos_token_ids == []
    assert "no end-of-sequence token of this model is known" in log


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (VOCABULARY, f"{VOCABULARY} is outside the model's vocabulary"),
        (-2, "-2 is outside the model's vocabulary"),
        (True, "True is no token id"),
        (2.5, "2.5 is no token id"),
        ({"a": 1}, "is no token id"),
        ("<|gone|>", "'<|gone|>' is no token"),
        ("far", f"'far' has id {VOCABULARY}, which the model does not know"),
        ("9999", "9999 is outside"),
    ],
)
def test_entries_that_name_no_token_are_left_out_with_a_warning(read, value, words):
    found, log = read({"eos_token_id": [value, 5]})
    assert found.eos_token_ids == [5]
    assert "generation_config.json: the end-of-sequence token" in log
    assert words in log


def test_all_places_count(read):
    found, _ = read(
        {"eos_token_id": [1]}, {"eos_token_id": 2, "text_config": {"eos_token_id": 3}}, eos_token="<|end|>"
    )
    assert found.eos_token_ids == [1, 2, 3, 7]
    assert read({"eos_token_id": 1}, {"text_config": "x"})[0].eos_token_ids == [1]


@pytest.mark.parametrize(
    "broken", ["", "{", '{"eos_token_id": 2', "[1]", "null", "\x00", "2" * 5000, "[" * 100_000]
)
def test_a_broken_file_is_said_and_the_rest_counts(read, broken):
    found, log = read(broken, {"eos_token_id": 2}, recommended={"top_k": 4})
    assert found.eos_token_ids == [2]
    assert found.sampling == Sampling(top_k=4)
    assert "generation_config.json can't be read" in log


def test_values_are_those_that_transformers_reads(read, tmp_path):
    file = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.05,
        "eos_token_id": 1,
    }
    found, log = read(file)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    ours = msgspec.structs.asdict(found.sampling)
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        # A request brings a float32.
        assert ours[name] == np.float32(getattr(theirs, name)) == np.float32(file[name])
    assert "temperature 0.6, top_p 0.95, min_p 0.05, repetition_penalty 1.05, top_k 20" in log
    assert "WARNING" not in log
    assert read(file, recommended=None)[0].sampling == Sampling()


def test_without_values_sampling_is_neutral(read):
    found, log = read({"eos_token_id": 1, "temperature": None, "transformers_version": "5"})
    assert found.sampling == Sampling()
    assert "sampling" not in log


def test_recommended_values_give_way_to_the_files_own(read):
    found, _ = read({"temperature": 0.5}, recommended={"temperature": 0.2, "top_p": 0.9})
    assert found.sampling == Sampling(temperature=0.5, top_p=float(np.float32(0.9)))


def test_without_sampling_the_most_likely_token_is_taken(read):
    found, log = read({"do_sample": False, "temperature": 0.7, "top_k": 50, "repetition_penalty": 1.25})
    assert found.sampling == Sampling(temperature=0.0, repetition_penalty=1.25)
    assert "do_sample is false, so that these are not used: temperature, top_k" in log


def test_no_top_k_in_other_servers_words(read):
    found, log = read({"top_k": -1, "eos_token_id": 1})
    assert found.sampling == Sampling()
    assert "WARNING" not in log


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", [1]),
        ("temperature", 10**400),
        ("temperature", 1e39),
        ("temperature", "x" * 1000),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 2.5),
        ("top_k", 2**32),
        ("top_k", float("inf")),
        ("min_p", 2),
        ("repetition_penalty", 0),
    ],
)
def test_values_that_no_request_could_have_are_said_and_not_used(read, name, value):
    found, log = read({name: value, "eos_token_id": 1})
    assert found.sampling == Sampling()
    assert "WARNING  longspan.models" in log
    assert f"generation_config.json: {name} is " in log
    assert len(log) < 300


@pytest.mark.parametrize("value", ["false", 0, []])
def test_do_sample_that_is_no_answer_is_said(read, value):
    found, log = read({"do_sample": value, "temperature": 0.5, "eos_token_id": 1})
    assert found.sampling == Sampling(temperature=0.5)
    assert "neither true nor false" in log


def test_unsupported_settings_are_logged_once(read):
    file = {"num_beams": 4, "length_penalty": 2.0, "no_repeat_ngram_size": 3, "suppress_tokens": [1, 2]}
    _, log = read(
        {**file, "min_length": 5, "max_length": CONTEXT - 1, "hot_new_thing": "x", "eos_token_id": 1}
    )
    lines = [line for line in log.splitlines() if "Longspan does not do" in line]
    assert len(lines) == 1
    for part in ("num_beams 4", "length_penalty 2.0", "no_repeat_ngram_size 3", "suppress_tokens [1, 2]"):
        assert part in lines[0]
    for part in ("min_length 5", f"max_length {CONTEXT - 1}", "hot_new_thing 'x'"):
        assert part in lines[0]


def test_a_forced_token_of_id_0_is_said(read):
    _, log = read({"forced_bos_token_id": 0, "forced_eos_token_id": None, "eos_token_id": 1})
    assert log.count("forced_") == 1
    assert "forced_bos_token_id 0" in log


def test_defaults_that_transformers_writes_are_not_logged(read, tmp_path):
    config = transformers.GenerationConfig(eos_token_id=1, max_length=CONTEXT, bos_token_id=0)
    _, log = read(
        {**config.to_dict(), "num_beams": 1, "length_penalty": 1.0, "typical_p": 1.0, "min_length": 0}
    )
    assert log == ""
