"""Ways to make a hostile checkpoint of a good tiny one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from server.engine.build import build_engine
from server.messages import Ready
from server.models.generation import Generation, read_generation
from server.models.resolve import resolve_model
from server.settings import Settings
from server.text.load import check_tokens, load_tokenizer
from server.text.tokenizer import Tokenizer
from tests.engine.harness import greedy_requests, run
from tests.models.changes import (
    ABSENT,
    CONFIG,
    GENERATION,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    Change,
    edited,
    holds,
    put,
    says,
    spelled,
    tensor,
)


def start(folder: Path, cache: Path, *, text: bool = True) -> int:
    """Goes through what ``longspan serve`` does of a model, and answers a request of it.

    Args:
        folder: the model.
        cache: of the settings.
        text: also loads the tokenizer.

    Returns:
        The number of tokens in the answer.

    Raises:
        RefusedError: the model is refused.
    """
    settings = Settings(cache_dir=cache, kv_memory="1MiB", weights="float")
    files = resolve_model(str(folder), cache, lambda *_: None)
    core, ready = build_engine(settings, files.folder, lambda *_: None)
    prompt = [5, 6, 7]
    if text:
        tokenizer = tokenizer_of(files.folder, ready.vocabulary_size, ready.longest_text)
        generation_of(files.folder, ready, tokenizer)
        prompt = tokenizer.encode("hello")
    (outcome,) = run(core, greedy_requests([prompt], 3)).values()
    return len(outcome.tokens)


def tokenizer_of(folder: Path, vocabulary_size: int, most: int | None = None) -> Tokenizer:
    """The tokenizer as ``longspan serve`` loads it.

    Raises:
        RefusedError: it is refused.
    """
    tokenizer = load_tokenizer(folder, str(folder), None)
    check_tokens(tokenizer, vocabulary_size, most)
    return tokenizer


def generation_of(folder: Path, ready: Ready, tokenizer: Tokenizer) -> Generation:
    """The settings of generation as ``longspan serve`` reads them."""
    return read_generation(
        folder, ready, eos_token=tokenizer.eos_token, token_id=tokenizer.token_id, recommended={}
    )


EMBEDDING = "model.embed_tokens.weight"
DEEP = "[" * 1_000_000
_YARN = {"rope_type": "yarn", "rope_theta": 1e4}
_SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}


def _no_vocabulary(content: dict[str, Any]) -> None:
    content["model"] |= {"vocab": {}, "merges": []}
    content["added_tokens"] = []


def _adds(token: int) -> Change:
    """The tokenizer begins and ends every text with a token."""
    special = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = [special, {"Sequence": {"id": "A", "type_id": 0}}, special]
    kind = {"type": "TemplateProcessing", "single": text, "pair": text}
    named = {"<s>": {"id": "<s>", "ids": [token], "tokens": ["<s>"]}}
    return edited(TOKENIZER, lambda said: said.update(post_processor=kind | {"special_tokens": named}))


def _twice(content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    again = b'{"lm_head.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    written = again + content[9 : 8 + length]
    return len(written).to_bytes(8, "little") + written + content[8 + length :]


REFUSED: dict[str, tuple[Change, str]] = {
    # Claims beyond what the files hold.
    "a hidden size of 65,536": (says(hidden_size=65536), r"\[320, 64\] in the file, \[320, 65536\] by the"),
    "a hidden size of 10**18": (says(hidden_size=10**18), "Storage size calculation overflowed"),
    "a vocabulary of 2**31": (says(vocab_size=2**31), r"\[320, 64\] in the file, \[2147483648, 64\] by the"),
    "a wide MLP": (says(intermediate_size=1 << 24), r"\[64, 128\] in the file, \[64, 16777216\] by the"),
    "a million layers": (says(num_hidden_layers=10**6), "more than 1168 parameters, but its files hold 21"),
    "10**18 layers": (says(num_hidden_layers=10**18), "no model has more than 1,000,000"),
    "a billion labels": (says(num_labels=10**9), "says num_labels 1000000000, and no model has more"),
    "a billion heads": (says(num_attention_heads=10**9), "says num_attention_heads 1000000000"),
    # Values that are none.
    "no hidden size, but null": (says(hidden_size=None), "Field 'hidden_size' expected int"),
    "a hidden size in words": (says(hidden_size="many"), "Field 'hidden_size' expected int"),
    "a hidden size of NaN": (says(hidden_size=float("nan")), "says hidden_size nan, with which nothing"),
    "a negative hidden size": (says(hidden_size=-64), "negative dimension|not a multiple|another shape"),
    "no heads": (says(num_attention_heads=0), "modulo by zero"),
    "no KV heads": (says(num_key_value_heads=0), "can't be loaded: integer division or modulo by zero"),
    "heads that do not divide": (
        says(num_attention_heads=7, head_dim=ABSENT),
        "not a multiple of the number",
    ),
    "no layers": (says(num_hidden_layers=0), "have 2 layers, but its config only 0"),
    "a head size of 0": (says(head_dim=0), "0.0 cannot be raised to a negative power"),
    "an infinite epsilon": (says(rms_norm_eps=float("inf")), "says rms_norm_eps inf, with which nothing"),
    "a context of 0": (says(max_position_embeddings=0), "does not say how long its context is"),
    "a context in words": (says(max_position_embeddings="long"), "'max_position_embeddings' expected int"),
    "an unknown activation": (says(hidden_act="evil"), "'evil', which it does not know"),
    "no model type": (says(model_type=ABSENT), "names no model_type"),
    "a model type that is a list": (says(model_type=["llama"]), r"no model type \['llama'\]"),
    "architectures that are numbers": (says(architectures=[5]), "'int' object has no attribute 'endswith'"),
    "a part that is a list": (says(text_config=[1]), "does not say how long its context is"),
    "a quantization that is a number": (says(quantization_config=5), "'int' object has no attribute"),
    "code of its own": (says(model_type="mine", auto_map={"AutoConfig": "evil.C"}), "needs Python code"),
    "too few kinds of layers": (says(layer_types=["full_attention"]), "must be equal to the number of"),
    # Rotary positions.
    "rope_scaling of an unknown type": (
        says(rope_scaling={"type": "evil"}),
        "'evil', which it does not know",
    ),
    "rope_scaling that is a list": (says(rope_scaling=[1]), "'rope_parameters' with value"),
    "a negative factor": (says(rope_parameters=_YARN | {"factor": -4.0}), "have the factor -4.0; it must be"),
    "an infinite factor": (says(rope_parameters=_YARN | {"factor": float("inf")}), "says factor inf"),
    "a factor of 1e300": (says(rope_parameters=_YARN | {"factor": 1e300}), r"have the factor 1e\+300"),
    "a base below 0": (
        says(rope_parameters={"rope_type": "default", "rope_theta": -5.0}),
        "keys are NaN",
    ),
    "a base of NaN": (
        says(rope_parameters={"rope_type": "default", "rope_theta": float("nan")}),
        "says rope_theta nan",
    ),
    # JSON.
    "a config that is a list": (holds(CONFIG, "[1, 2]"), "holds no JSON object"),
    "an empty config": (holds(CONFIG, ""), "Expecting value"),
    "a million brackets": (holds(CONFIG, DEEP), "nested too deeply"),
    "a million braces": (holds(CONFIG, '{"a":' * 1_000_000), "nested too deeply"),
    "UTF-16": (spelled(lambda content: content.decode().encode("utf-16")), "'utf-8' codec can't decode"),
    "a byte order mark": (spelled(lambda content: b"\xef\xbb\xbf" + content), "Unexpected UTF-8 BOM"),
    "a key twice": (spelled(lambda content: b'{"hidden_size": 128,' + content[1:]), "'hidden_size' twice"),
    "a number of 100,000 digits": (holds(CONFIG, '{"a": ' + "9" * 100_000 + "}"), "Exceeds the limit"),
    "a config that is a folder": (
        lambda folder: ((folder / CONFIG).unlink(), (folder / CONFIG).mkdir()),
        "has no config.json",
    ),
    # Files elsewhere.
    "weights elsewhere": (says(transformers_weights="../x.safetensors"), "no name of a file beside it"),
    "a config behind a link": (
        lambda folder: (put(folder.parent / "secret", b"{}"), _link(folder / CONFIG, "../secret")),
        "is a link to a file outside the model's folder",
    ),
    "a link to itself": (
        lambda folder: _link(folder / "NOTES", "NOTES"),
        "NOTES is a link that leads nowhere",
    ),
    "links in a circle": (
        lambda folder: (_link(folder / TOKENIZER, "b"), _link(folder / "b", TOKENIZER)),
        "is a link that leads nowhere",
    ),
    "templates behind a link to itself": (
        lambda folder: _link(folder / "additional_chat_templates", "additional_chat_templates"),
        "additional_chat_templates is a link that leads nowhere",
    ),
    # Weights.
    "a header of 2**63 bytes": (holds(WEIGHTS, (1 << 63).to_bytes(8, "little") + b"{}"), "header too large"),
    "a header of a gigabyte": (holds(WEIGHTS, (10**9).to_bytes(8, "little") + b"{}"), "header too large"),
    "a header of brackets": (
        holds(WEIGHTS, len(DEEP).to_bytes(8, "little") + DEEP.encode()),
        "maximum recursion depth",
    ),
    "no weights": (holds(WEIGHTS, b""), "damaged or incomplete"),
    "weights cut short": (spelled(lambda content: content[:-1000], WEIGHTS), "file not fully covered"),
    "bytes beyond the weights": (spelled(lambda content: content + b"x" * 100, WEIGHTS), "not fully covered"),
    "overlapping offsets": (tensor(EMBEDDING, data_offsets=[0, 320 * 64 * 4]), "invalid offset for tensor"),
    "negative offsets": (tensor(EMBEDDING, data_offsets=[-1, 5]), "expected usize"),
    "a shape that overflows": (tensor(EMBEDDING, shape=[1 << 62, 1 << 62]), "overflow computing buffer size"),
    "another shape": (tensor(EMBEDDING, shape=[64, 320]), r"\[64, 320\] in the file, \[320, 64\] by the"),
    "an unknown dtype": (tensor(EMBEDDING, dtype="X"), "unknown variant `X`"),
    "integers": (
        tensor(EMBEDDING, dtype="I32"),
        "not in floating point: model.embed_tokens.weight is I32",
    ),
    "complex numbers": (tensor(EMBEDDING, dtype="C64", shape=[160, 64]), "another shape|floating point"),
    "integers beside quantized weights": (
        lambda folder: (
            tensor("model.norm.weight", dtype="I32")(folder),
            says(quantization_config={"quant_method": "fp8"})(folder),
        ),
        "model.norm.weight is I32, but fp8 does not quantize",
    ),
    "a tensor twice": (spelled(_twice, WEIGHTS), "'lm_head.weight' twice"),
    "NaN": (spelled(lambda content: content[:-4] + b"\xff\xff\xff\xff", WEIGHTS), "1 non-finite numbers"),
}

TEXTS_REFUSED: dict[str, tuple[Change, str]] = {
    "an empty tokenizer": (holds(TOKENIZER, ""), "can't be read"),
    "a tokenizer that is a list": (holds(TOKENIZER, "[]"), "can't be read"),
    "a tokenizer of brackets": (holds(TOKENIZER, DEEP), "maximum recursion depth exceeded"),
    "a tokenizer without a model": (edited(TOKENIZER, lambda said: said.pop("model")), "Model missing"),
    "a tokenizer without tokens": (
        lambda folder: (
            edited(TOKENIZER, _no_vocabulary)(folder),
            holds(TOKENIZER_CONFIG, "{}")(folder),
        ),
        "tokenizer .*can't be used",
    ),
    "only special tokens": (edited(TOKENIZER, _no_vocabulary), "no text becomes tokens that the model knows"),
    "a beginning that the model does not know": (
        _adds(9999),
        r"adds token 9999 to every text \(post_processor of tokenizer.json.* has none from 320 on",
    ),
    "a context without room for a text": (
        lambda folder: (_adds(1)(folder), says(max_position_embeddings=3)(folder)),
        r"texts have 3 tokens at least .* has room for 2 \(max_position_embeddings of config.json",
    ),
    "a negative id": (edited(TOKENIZER, lambda said: said["model"]["vocab"].update(x=-1)), "expected u32"),
    "merges of nothing": (
        edited(TOKENIZER, lambda said: said["model"]["merges"].append(["zz", "qq"])),
        "out of vocabulary",
    ),
    "a prefix longer than the tokens that have it": (
        edited(TOKENIZER, lambda said: said["model"].update(continuing_subword_prefix="#" * 40)),
        "the tokenizers library failed: .*out of range",
    ),
    "pieces of no length": (
        edited(TOKENIZER, lambda said: said.update(pre_tokenizer={"type": "FixedLength", "length": 0})),
        "can't be used: the tokenizers library failed: chunk size must be non-zero",
    ),
    "a pattern that is none": (
        edited(TOKENIZER, lambda said: said.update(pre_tokenizer=_SPLIT | {"pattern": {"Regex": "(("}})),
        "unmatched parenthesis",
    ),
    "a tokenizer_config that is a list": (holds(TOKENIZER_CONFIG, "[]"), "can't be read"),
    "a tokenizer_config of brackets": (holds(TOKENIZER_CONFIG, DEEP), "maximum recursion depth"),
    "a special token that is a number": (
        edited(TOKENIZER_CONFIG, lambda said: said.update(eos_token=5)),
        "eos_token has to be either str or AddedToken",
    ),
    "added tokens that are numbers": (
        edited(TOKENIZER_CONFIG, lambda said: said.update(added_tokens_decoder={"x": 5})),
        "Found a <class 'int'>",
    ),
    "a chat template that is no text": (holds("chat_template.jinja", b"\xff\xfe\x00"), "can't decode"),
}

# Faults that say nothing of the model itself: it is served, and the log says what is not used.
SERVED: dict[str, tuple[Change, str]] = {
    "numbers of which nothing is made": (
        says(
            num_parameters=134_515_008,
            n_params=7 * 10**9,
            num_dense_params=10**9,
            num_train_tokens=2 * 10**12,
            num_ctx=1 << 20,
            block_size=1 << 20,
        ),
        "",
    ),
    "generation_config that is a list": (holds(GENERATION, "[]"), "holds no JSON object"),
    "generation_config of brackets": (
        holds(GENERATION, DEEP),
        "config.json can't be",
    ),
    "generation_config in UTF-16": (
        holds(GENERATION, "{}".encode("utf-16")),
        "config.json can't be",
    ),
    "sampling that is nonsense": (
        holds(GENERATION, '{"temperature": NaN, "top_p": "x", "top_k": -7}'),
        "temperature is nan",
    ),
    "ends beyond the vocabulary": (
        holds(
            GENERATION,
            json.dumps({"eos_token_id": [10**20, -3, "nope", "9" * 5000, {"a": 1}]}),
        ),
        "is outside the model's vocabulary",
    ),
    "ends nested deeply": (
        holds(GENERATION, '{"eos_token_id": ' + "[" * 900 + "5" + "]" * 900 + "}"),
        "",
    ),
    "tokens far beyond the vocabulary": (
        edited(TOKENIZER, lambda said: said["model"]["vocab"].update(evil=2**32 - 1)),
        "the tokenizer has 4294966976 tokens that the model lacks",
    ),
    "a chat template that is a number": (
        lambda folder: (
            (folder / "chat_template.jinja").unlink(),
            edited(TOKENIZER_CONFIG, lambda said: said.update(chat_template=5))(folder),
        ),
        "conversations are refused",
    ),
    "a chat template that is none": (holds("chat_template.jinja", "{% for %}"), "conversations are refused"),
    "an end that is no token": (
        edited(TOKENIZER_CONFIG, lambda said: said.update(eos_token="<x>")),
        "",
    ),
    "an end that is no text": (
        holds(GENERATION, '{"eos_token_id": "\\ud800"}'),
        r"end-of-sequence token .* is no token of its tokenizer",
    ),
}


def _link(file: Path, target: str) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to(target)
