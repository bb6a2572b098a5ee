"""Steps of an encoder's engine: turns, budget, aborts."""

import pytest
import torch

from server.encoder_messages import Encode, Pooling, Task
from server.engine.encoder_core import EncoderCore
from server.messages import FinishReason
from server.models.encoders.load import load_encoder
from tests.encoders.zoo import CONTEXT, VOCABULARY, save_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = save_encoder("bert", tmp_path_factory.mktemp("bert"))
    return load_encoder(folder, "auto", "cpu", None, lambda stage, fraction: None).encoder


@pytest.fixture
def core(encoder):
    return EncoderCore(encoder, context_length=CONTEXT, max_running=4, max_batch_tokens=20)


def text(id_, turn=0, length=5):
    return Encode(id=id_, task=Task.EMBED, turn=turn, tokens=list(range(5, 5 + length)), pooling=Pooling.CLS)


def ids(output):
    return sorted(result.id for result in output.sequences)


def test_a_request_of_many_texts_does_not_keep_out_one_of_few(core):
    for turn in range(10):
        core.submit(text(turn, turn))
    assert ids(core.step()) == [0, 1, 2, 3]
    core.submit(text(100))  # its turn is the one that was served last
    assert ids(core.step()) == [4, 5, 6, 100]
    assert core.step().stats.waiting == 0


def test_requests_of_one_text_do_not_keep_out_one_of_many(core):
    for turn in range(20):
        core.submit(text(turn, turn))
    for id_ in range(100, 104):  # four callers that ask again as soon as they are answered
        core.submit(text(id_))
    steps = many = 0
    while many < 20 and steps < 100:
        computed = ids(core.step())
        steps += 1
        many += sum(id_ < 100 for id_ in computed)
        for id_ in computed:
            if id_ >= 100:
                core.submit(text(id_ + 4))
    assert many == 20
    assert steps <= 20, "the one of many has a fair share: a text of each step"


def test_a_step_keeps_to_its_budgets(core):
    for id_ in range(6):
        core.submit(text(id_, length=8))
    assert [len(core.step().sequences) for _ in range(3)] == [2, 2, 2]  # 20 tokens
    for id_ in range(6):
        core.submit(text(id_, length=1))
    assert [len(core.step().sequences) for _ in range(2)] == [4, 2]  # 4 texts
    core.submit(text(1, length=90))  # alone it may have more
    output = core.step()
    assert (output.stats.prompt_tokens, output.stats.running, core.has_work) == (90, 0, False)


def test_an_aborted_text_is_not_computed(core):
    for id_ in range(4):
        core.submit(text(id_))
    core.abort(1)
    core.abort(17)
    assert ids(core.step()) == [0, 2, 3]
    assert not core.has_work


def test_texts_that_do_not_fit_are_no_fault_of_others(core):
    for length in (0, CONTEXT + 1):
        with pytest.raises(ValueError, match="does not fit"):
            core.submit(text(1, length=length))


def test_tokens_and_types_that_the_model_lacks_are_no_fault_of_others(core):
    core.submit(text(1))
    for wrong in ({"tokens": [VOCABULARY]}, {"tokens": [5], "types": [2]}):
        with pytest.raises(ValueError, match=r"the model has no token(| type) \d+: it knows"):
            core.submit(Encode(id=2, task=Task.EMBED, turn=0, **wrong))
    assert ids(core.step()) == [1]


def vector(values):
    return torch.frombuffer(bytearray(values), dtype=torch.float32)


def break_on(monkeypatch, encoder, broken, error):
    """Has the encoder fail where ``broken`` holds for some text's tokens."""
    hidden = encoder.hidden

    def breaking(texts, types):
        if any(map(broken, texts)):
            raise error
        return hidden(texts, types)

    monkeypatch.setattr(encoder, "hidden", breaking)


def test_a_text_that_can_not_be_computed_fails_alone(core, encoder, monkeypatch):
    lengths = (3, 6, 4)
    for id_, length in enumerate(lengths):
        core.submit(text(id_, length=length))
    expected = {result.id: result.values for result in core.step().sequences}
    break_on(monkeypatch, encoder, lambda tokens: len(tokens) == 6, RuntimeError("a kernel refuses"))
    for id_, length in enumerate(lengths):
        core.submit(text(id_, length=length))
    output = core.step()
    assert {result.id: result.finish for result in output.sequences} == {
        0: FinishReason.STOP,
        1: FinishReason.FAILED,
        2: FinishReason.STOP,
    }
    for result in output.sequences:
        if result.finish is FinishReason.STOP:
            assert torch.allclose(vector(result.values), vector(expected[result.id]), atol=1e-5)
    assert not core.has_work
    core.submit(text(3))
    assert [result.finish for result in core.step().sequences] == [FinishReason.STOP], "it goes on"


def test_texts_that_do_not_fit_together_are_computed_one_by_one(core, encoder, monkeypatch):
    hidden = encoder.hidden

    def small(texts, types):
        if len(texts) > 1:
            raise MemoryError
        return hidden(texts, types)

    monkeypatch.setattr(encoder, "hidden", small)
    for id_ in range(3):
        core.submit(text(id_))
    assert [result.finish for result in core.step().sequences] == [FinishReason.STOP] * 3


def test_a_device_that_fails_ends_the_engine(core, encoder, monkeypatch):
    break_on(monkeypatch, encoder, lambda tokens: True, torch.AcceleratorError("an illegal memory access"))
    core.submit(text(1))
    with pytest.raises(torch.AcceleratorError):
        core.step()


def test_a_vector_that_is_not_finite_fails_its_text_only(core, encoder, monkeypatch):
    hidden = encoder.hidden

    def broken(texts, types):
        vectors = [vector.clone() for vector in hidden(texts, types)]
        vectors[0][0, 0] = torch.nan
        return vectors

    monkeypatch.setattr(encoder, "hidden", broken)
    core.submit(text(1))
    core.submit(text(2, length=6))
    assert [result.finish for result in core.step().sequences] == [FinishReason.FAILED, FinishReason.STOP]
