"""Checkpoints that were made to harm: each is refused in a sentence, within bounded time and memory."""

import logging
import re
import resource
import shutil
import time

import msgspec
import pytest

from server.errors import RefusedError
from server.text.template_process import TemplateProcess
from tests.api.fake_engine import READY
from tests.models.changes import CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS, copy
from tests.models.hostile import REFUSED, SERVED, TEXTS_REFUSED, generation_of, start, tokenizer_of
from tests.models.mutations import mutate
from tests.models_zoo import CONTEXT, VOCABULARY, save_tiny

# Beside other tests; without its checks a single case took minutes, or ended the process.
MOST_SECONDS = 20.0
MOST_GROWN = 300 << 20


@pytest.fixture(autouse=True)
def templates_stay_ready(monkeypatch):
    """A tokenizer without chats ends the process that renders them, which takes a second to start again."""
    monkeypatch.setattr(TemplateProcess, "close", lambda self: None)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = save_tiny("llama", tmp_path_factory.mktemp("good") / "model")
    assert start(folder, folder.parent / "cache") == 3
    return folder


def refused(good, tmp_path, change, sentence, *, text):
    folder = copy(good, tmp_path / "model")
    change(folder)
    begun = time.monotonic()
    with pytest.raises(RefusedError, match=sentence) as refusal:
        start(folder, tmp_path / "cache", text=text)
    assert time.monotonic() - begun < MOST_SECONDS
    assert len(str(refusal.value)) < 1500


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_checkpoint_is_refused_with_a_sentence(name, good, tmp_path):
    change, sentence = REFUSED[name]
    refused(good, tmp_path, change, sentence, text=False)


@pytest.mark.parametrize("name", TEXTS_REFUSED)
def test_a_hostile_tokenizer_is_refused_with_a_sentence(name, good, tmp_path):
    change, sentence = TEXTS_REFUSED[name]
    refused(good, tmp_path, change, sentence, text=True)


@pytest.mark.parametrize("name", SERVED)
def test_what_is_not_needed_is_left_out_and_told(name, good, tmp_path, caplog):
    change, told = SERVED[name]
    folder = copy(good, tmp_path / "model")
    change(folder)
    with caplog.at_level(logging.INFO):
        assert start(folder, tmp_path / "cache") == 3
    assert re.search(told, caplog.text)


# Of mutations of each file, the least and the largest share that is served.
CHANGED = {
    CONFIG: (0.1, 0.9),
    WEIGHTS: (0.0, 0.5),
    TOKENIZER: (0.05, 0.9),
    TOKENIZER_CONFIG: (0.05, 0.9),
    GENERATION: (1.0, 1.0),
}


def refusal_of(folder, name, ready):
    """The sentence that refuses a checkpoint with a mutated file; empty if a request is answered."""
    try:
        if name in (TOKENIZER, TOKENIZER_CONFIG):
            tokenizer_of(folder, VOCABULARY).encode("hello")
        elif name == GENERATION:
            generation_of(folder, ready, tokenizer_of(folder, VOCABULARY))
        else:
            assert start(folder, folder.parent / "cache", text=False) == 3
    except RefusedError as refusal:
        return str(refusal)
    return ""


def try_mutations(good, tmp_path, name, seeds):
    ready = msgspec.structs.replace(READY, vocabulary_size=VOCABULARY, context_length=CONTEXT)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    served = 0
    for seed in seeds:
        folder = copy(good, tmp_path / "model")
        mutate(folder, name, seed)
        begun = time.monotonic()
        try:
            sentence = refusal_of(folder, name, ready)
        except Exception as error:
            raise AssertionError(f"mutation {seed} of {name} is neither served nor refused") from error
        assert "\n" not in sentence, f"mutation {seed} of {name}"
        assert time.monotonic() - begun < MOST_SECONDS, f"mutation {seed} of {name}"
        served += not sentence
        shutil.rmtree(folder)
    least, most = CHANGED[name]
    assert least <= served / len(seeds) <= most
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MOST_GROWN >> 10


@pytest.mark.parametrize("name", CHANGED)
def test_mutated_files_are_served_or_refused(name, good, tmp_path):
    try_mutations(good, tmp_path, name, range(30))


@pytest.mark.stress
@pytest.mark.parametrize("name", CHANGED)
def test_thousands_of_mutated_files_are_served_or_refused(name, good, tmp_path):
    try_mutations(good, tmp_path, name, range(1000, 2000))
