"""Packed models kept on disk: used where they are good, made again where they are not."""

import dataclasses
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

from server.engine.build import build_engine
from server.engine.prepare import prepare
from server.errors import RefusedError
from server.models import kept, packed_file
from server.models.kept import kept_file
from server.models.quantized.embedding import QuantizedEmbedding
from server.models.quantized.model import QuantizedModel
from server.models.sample import sample_logits
from server.models.sampled import sampled_digest
from server.settings import Settings
from tests.engine.harness import greedy_requests, run
from tests.gguf_blocks import as_published
from tests.models_zoo import VOCABULARY, save_tiny

PROMPTS = [
    torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 33)
]


def ignore(stage, fraction):
    pass


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Prepares a tiny model, and tells whether transformers was asked for it."""
    asked = []
    monkeypatch.setattr("server.models.load.read_config", _noting(asked, "server.models.load.read_config"))

    def start(folder, **more):
        asked.clear()
        given = {"cache_dir": tmp_path / "cache", "weights": "int8", "kv_memory": "8MiB", **more}
        prepared = prepare(Settings(**given), folder, ignore)
        return prepared, bool(asked)

    return start


def _noting(asked, name):
    from server.models import load as loading

    plain = getattr(loading, name.rpartition(".")[2])

    def noting(*arguments):
        asked.append(name)
        return plain(*arguments)

    return noting


def logits_of(prepared):
    return sample_logits(prepared.loaded, prepared.attention, 16, prepared.kv_dtype)


@pytest.mark.parametrize(
    ("kind", "config", "weights"),
    [
        ("llama", {}, "int8"),
        ("llama", {"tie_word_embeddings": True}, "int4"),
        ("llama", {"num_hidden_layers": 1, "mlp_bias": True}, "int4"),
        ("qwen2", {}, "int4"),
        ("qwen3", {}, "int8"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "int8"),
    ],
)
def test_the_next_start_computes_the_same_without_transformers(kind, config, weights, start, tmp_path):
    folder = save_tiny(kind, tmp_path / kind, **config)
    first, asked = start(folder, weights=weights)
    assert asked
    assert isinstance(first.loaded.model, QuantizedModel)
    again, asked = start(folder, weights=weights)
    assert not asked
    assert torch.equal(logits_of(again), logits_of(first))
    own = dataclasses.replace(first.loaded, model=None, mapped_bytes=again.loaded.mapped_bytes)
    assert dataclasses.replace(again.loaded, model=None) == own
    assert (again.weights, again.kv_dtype) == (first.weights, first.kv_dtype) == (weights, torch.float16)


def test_weights_published_in_few_bits_take_no_table_of_floats(start, tmp_path):
    folder = save_tiny("llama", tmp_path / "llama", tie_word_embeddings=True)
    rounded = start(folder)[0].loaded.model
    assert not isinstance(rounded.embedding, QuantizedEmbedding)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        plain.get_input_embeddings().weight.copy_(rounded.head.weight)
    plain.save_pretrained(folder)
    for _ in range(2):
        exact = start(folder)[0].loaded.model
        assert exact.embedding.codes is exact.head.codes
        ids = torch.tensor([0, 17, VOCABULARY - 1, 17])
        assert torch.equal(exact.embedding(ids), plain.get_input_embeddings().weight[ids])


@pytest.mark.parametrize("tied", [False, True])
def test_an_output_layer_of_floats_is_kept_beside_packed_layers(tied, start, tmp_path):
    """As GGUF files of Q4_0 have it, whose output layer is often of Q6_K."""
    folder = save_tiny("llama", tmp_path / "llama", tie_word_embeddings=tied)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.copy_(as_published(module.weight, "Q4_0"))
    plain.save_pretrained(folder)
    first, _ = start(folder, weights="auto")
    again, asked = start(folder, weights="auto")
    assert not asked
    for prepared in (first, again):
        model = prepared.loaded.model
        assert prepared.weights == "int4"
        assert torch.equal(model.head.weight, plain.lm_head.weight)
        assert (model.embedding.weight.data_ptr() == model.head.weight.data_ptr()) == tied
    assert torch.equal(logits_of(again), logits_of(first))


def test_a_broken_or_outdated_file_is_made_again(start, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    folder = save_tiny("llama", tmp_path / "llama")
    start(folder)
    file = kept_file(folder, "int8", tmp_path / "cache")

    def made_again(why):
        caplog.clear()
        assert start(folder)[1]
        assert f"{file} are made again: {why}" in caplog.text
        caplog.clear()
        assert not start(folder)[1]
        assert caplog.text == ""

    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    made_again("its content is not what was written")
    file.write_bytes(content[:1000])
    made_again("it can't be read")
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    made_again("the model's files have changed since")
    monkeypatch.setattr(kept, "_VERSION", 0)
    made_again("they are of other versions")


def test_weights_of_the_same_size_and_time_are_served_and_not_the_old_ones(start, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    folder = save_tiny("llama", tmp_path / "llama")
    first, _ = start(folder)
    weights = folder / "model.safetensors"
    before, content = weights.stat(), bytearray(weights.read_bytes())
    for at in range(len(content) // 2, len(content) - 3, 4):
        content[at + 3] ^= 0x80  # the sign of a number
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size
    again, asked = start(folder)
    assert asked
    assert "are made again: the model's files have changed since" in caplog.text
    assert not torch.equal(logits_of(again), logits_of(first))
    assert not start(folder)[1]


def test_samples_of_a_large_file_lie_all_over_it(tmp_path):
    file, size = tmp_path / "large", 16 << 20
    content = np.zeros(size, np.uint8)

    def digest():
        content.tofile(file)
        return sampled_digest(file)

    plain = digest()
    for begin in (0, 1 << 19, 3 << 20, size // 2, size - (1 << 14)):
        content[begin : begin + (size >> 10)] = 1  # as long as two samples lie apart
        assert digest() != plain
        content[:] = 0
    assert digest() == plain


def test_logits_that_are_not_those_proven_are_noticed(start, tmp_path, caplog):
    folder = save_tiny("llama", tmp_path / "llama")
    first, _ = start(folder)
    file = kept_file(folder, "int8", tmp_path / "cache")
    description, tensors = packed_file.read(file)
    scales = tensors["0.down.scales"]
    packed_file.write(file, description, {**tensors, "0.down.scales": scales * 1.5})
    again, asked = start(folder)
    assert asked
    assert "made again: its logits differ by" in caplog.text
    assert torch.equal(logits_of(again), logits_of(first))
    assert not start(folder)[1]


def test_models_with_more_than_the_common_parts_are_served_as_before(start, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = save_tiny("gemma2", tmp_path / "gemma2")
    for _ in range(2):
        prepared, asked = start(folder)
        assert asked
        assert prepared.weights == "int8"
        assert not isinstance(prepared.loaded.model, QuantizedModel)
    assert "every start packs the weights of Gemma2ForCausalLM: " in caplog.text
    assert not (tmp_path / "cache" / "packed").exists()


def test_packed_weights_are_not_said_to_be_read_where_there_are_none(tmp_path):
    folder = save_tiny("llama", tmp_path / "llama")
    settings = Settings(cache_dir=tmp_path / "cache", weights="int8", kv_memory="8MiB")
    told: list[list[str]] = []
    for _ in range(2):
        told.append([])
        prepare(settings, folder, lambda stage, fraction: told[-1].append(stage))
    assert ["reading the packed weights" in stages for stages in told] == [False, True]


def test_a_cache_that_cannot_be_written_is_said(start, tmp_path, caplog):
    folder = save_tiny("llama", tmp_path / "llama")
    (tmp_path / "cache").write_text("in the way")
    prepared, _ = start(folder)
    assert prepared.weights == "int8"
    assert "the packed weights can't be kept, so that every start packs them again" in caplog.text


def test_settings_that_packed_weights_do_not_go_with(start, tmp_path):
    folder = save_tiny("llama", tmp_path / "llama")
    start(folder)
    assert start(folder, weights="float")[0].weights == "float32"
    assert start(folder, weights="auto", dtype="bfloat16")[0].weights == "bfloat16"
    stretched, asked = start(folder, rope_scaling="linear", rope_option={"factor": "2"})
    assert asked
    assert stretched.loaded.context_length == 1024
    assert isinstance(stretched.loaded.model, QuantizedModel)  # of its parts all the same
    assert not start(folder, kv_dtype="float32", page_size=4, kernel="sdpa", max_context=33)[1]
    assert not start(folder, kv_dtype="float8_e4m3")[1]
    with pytest.raises(RefusedError, match="--max-context 513 is more than the model's own 512"):
        start(folder, max_context=513)
    with pytest.raises(RefusedError, match="--rope-option factor is a detail of --rope-scaling"):
        start(folder, rope_option={"factor": "2"})


def test_an_engine_from_disk_gives_the_same_tokens(start, tmp_path):
    folder = save_tiny("llama", tmp_path / "llama")
    outcomes = []
    for _ in range(2):
        settings = Settings(
            cache_dir=tmp_path / "cache",
            weights="int8",
            kv_memory="8MiB",
            attention="sliding_window",
            # In-cache positions need to know how the model rotates its keys.
            attention_option={"window": "24", "sinks": "4", "positions": "cache"},
        )
        core, ready = build_engine(settings, folder, ignore)
        assert (ready.weights, ready.architecture) == ("int8", "LlamaForCausalLM")
        outcomes.append([outcome.tokens for outcome in run(core, greedy_requests(PROMPTS, 12)).values()])
    assert outcomes[0] == outcomes[1]


_ENGINE = """
import os, re, sys
from pathlib import Path
import torch
from server.engine.start import start_engine
from server.messages import Sampling, Submit
from server.settings import Settings

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

before = peak()
folder = Path(sys.argv[1])
core, ready = start_engine(Settings(), folder, lambda *_: None, os.pipe()[0], folder)
started = peak()
prompt = [7 * n % ready.vocabulary_size for n in range(900)]
core.submit(Submit(id=1, prompt=prompt, sampling=Sampling(temperature=0.0), max_tokens=2))
while core.has_work:
    core.step()
print(before, started, peak(), ready.kv_bytes // (ready.pages_total + 1) * (902 // ready.page_size + 1))
print("transformers" in sys.modules, "torch._dynamo" in sys.modules)
"""


def test_the_default_models_engine_takes_little_memory_and_no_transformers(default_model):
    """A copy of weights or embeddings in floats would take far more than the allowance."""
    settings = Settings()
    file = kept_file(default_model, settings.weights, settings.cache_dir)
    if kept.read_kept(file, default_model) is None:
        prepare(settings, default_model, ignore)
    lines = subprocess.run(
        [sys.executable, "-c", _ENGINE, str(default_model)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    ).stdout.splitlines()
    before, started, worked, pages = map(int, lines[0].split())
    assert lines[1] == "False False"
    # How much of torch's own libraries is mapped meanwhile differs by tens of MiB with the state of the page
    # cache; a copy of the embeddings alone would be 108 MiB.
    assert started - before < file.stat().st_size + (96 << 20)
    # Keys and values, and rows of a step: those of attention and those between the layers.
    assert worked - started < pages + (64 << 20)
