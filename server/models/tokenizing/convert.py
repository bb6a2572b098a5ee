"""A model's tokenizer files to a ``tokenizer.json``, proven on sample texts.

A program: ``python -m server.models.tokenizing.convert FOLDER TARGET``; for failures see
``server.models.conversions``.
"""

from __future__ import annotations

import base64
import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from tokenizers.models import Unigram

from server.errors import quoted
from server.models.conversions import arguments, writing
from server.models.json_file import read_object
from server.models.tokenizing.frame import enclose, frame
from server.models.tokenizing.numbering import family_of, numbering
from server.models.tokenizing.sentencepiece_file import (
    NotSentencePieceError,
    add_tokens,
    build_tokenizer,
    parse_model,
)

# Classes of transformers, and models that name none, whose token ids are those of the SentencePiece model.
_PLAIN_CLASSES = {"LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "TokenizersBackend"}
_PLAIN_MODELS = {
    *("llama", "mistral", "mixtral", "ministral", "gemma", "gemma2", "gemma3", "gemma3_text", "phi3"),
    *("internlm2", "starcoder2", "stablelm", "olmo", "granite", "nemotron"),
}
COPIED = (
    *("config.json", "generation_config.json", "processor_config.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates"),
)
"""Files and folders beside a tokenizer that are read with it."""

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")

_SAMPLES = (
    "The quick brown fox, 12 345.67 jumps: it's 'over' the \"lazy\" dog!",
    "def f(x):\n\treturn x ** 2  # two  spaces\r\n\n\n",
    "Grüße, naïve café, e\u0301, Ελλάδα, Привет, שלום, مرحبا, नमस्ते, ไทย",
    "東京タワー 한국어 中文，测试。 🙂👩\u200d👩\u200d👧 ½ ² Ⅷ",  # noqa: RUF001 (a Chinese comma)
    "camelCase HTTPServer snake_case https://example.org/a?b=c&d=%20 \u00a0x\u3000y",
    "x",
)


def convert(folder: Path, target: Path) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json``, and copies the configs beside them.

    Args:
        folder: of the model; nothing is written there.
        target: where to write; made if missing.

    Raises:
        ValueError: the files can't be converted, or the result is not what they say.
    """
    config = _read(folder / "tokenizer_config.json")
    if (folder / "tekken.json").is_file():
        tokenizer, reference = _tekken(folder / "tekken.json")
    elif (model := _model_file(folder)) is not None:
        tokenizer, reference = _from_model(folder, model, config)
    else:
        tokenizer, reference = _by_class(folder), None
    if reference is not None:
        _prove(tokenizer, reference)
    with writing():
        _write(tokenizer, folder, target)


def _write(tokenizer: Any, folder: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(target)
    for name in COPIED:
        if (folder / name).is_file():
            shutil.copy(folder / name, target)
        elif (folder / name).is_dir():
            shutil.copytree(folder / name, target / name, dirs_exist_ok=True)
    # By this version transformers knows that the tokenizer is none of Mistral's faulty early ones.
    own = {**_read(folder / "config.json"), "transformers_version": transformers.__version__}
    (target / "config.json").write_text(json.dumps(own, indent=2))


def _prove(tokenizer: Any, reference: Callable[[str], list[int]]) -> None:
    backend = tokenizer.backend_tokenizer
    # Of several ways to cut a word that are equally likely, a unigram model may take any.
    form = sorted if isinstance(backend.model, Unigram) else list
    for text in _SAMPLES:
        if form(backend.encode(text, add_special_tokens=False).ids) != form(reference(text)):
            raise ValueError(f"converted, they would turn {quoted(text)} into other tokens than before")


def _model_file(folder: Path) -> Path | None:
    found = [
        *folder.glob("tokenizer.model"),
        *folder.glob("source.spm"),
        *sorted([*folder.glob("*.model"), *folder.glob("*.tiktoken")]),
    ]
    return found[0] if found else None


def _from_model(folder: Path, file: Path, config: dict[str, Any]) -> tuple[Any, Callable[[str], list[int]]]:
    own = config.get("tokenizer_class")
    if own is not None and not isinstance(own, str):
        raise ValueError(f"tokenizer_config.json: tokenizer_class is {quoted(own)}, which names no class")
    kind = _read(folder / "config.json").get("model_type")
    plain = own.removesuffix("Fast") in _PLAIN_CLASSES if own else kind in _PLAIN_MODELS
    family = family_of(own, kind)
    try:
        model = parse_model(file)
    except NotSentencePieceError:
        if family is not None:
            raise
        return _tiktoken(file, config, kind)
    if family is not None:
        return _numbered(folder, file, config, model, family)
    if not plain:
        raise ValueError(
            f"{file.name} holds a SentencePiece model, which {own or kind} may give other ids than its own"
        )
    own_encode = _encode(file)
    backend = build_tokenizer(model, legacy=config.get("legacy", True) is not False)
    add_tokens(backend, folder, config)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    trainer = model.trainer_spec
    pieces = {
        "bos_token": trainer.bos_piece if trainer.bos_id >= 0 else None,
        "eos_token": trainer.eos_piece if trainer.eos_id >= 0 else None,
        "unk_token": trainer.unk_piece,
        "pad_token": trainer.pad_piece if trainer.pad_id >= 0 else None,
    }
    _set_roles(tokenizer, {**_read(folder / "special_tokens_map.json"), **config}, pieces)
    frame(tokenizer, bos=config.get("add_bos_token", True), eos=config.get("add_eos_token", False))
    tokenizer.chat_template = _template(config)
    return tokenizer, own_encode


def _numbered(
    folder: Path, file: Path, config: dict[str, Any], model: Any, family: str
) -> tuple[Any, Callable[[str], list[int]]]:
    """A SentencePiece model whose ids are not those of its model, as of encoder-decoders."""
    own_encode = _encode(file)
    numbered = numbering(family, model.pieces, folder, config)
    backend = build_tokenizer(model, legacy=config.get("legacy", True) is not False, numbered=numbered)
    add_tokens(backend, folder, config)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    _set_roles(tokenizer, {**_read(folder / "special_tokens_map.json"), **config}, numbered.roles)
    enclose(tokenizer, numbered.begin, numbered.end)
    return tokenizer, lambda text: [numbered.number[index] for index in own_encode(text)]


def _encode(file: Path) -> Callable[[str], list[int]]:
    """SentencePiece's own tokens of a text.

    Raises:
        ValueError: SentencePiece itself does not take the file.
    """
    library = _needed("sentencepiece")
    try:
        encode: Callable[[str], list[int]] = library.SentencePieceProcessor(
            model_proto=file.read_bytes()
        ).encode
        encode(_SAMPLES[0])
    except Exception as error:  # of any kind
        raise ValueError(f"SentencePiece itself can't read {file.name}: {error}") from error
    return encode


def _tekken(file: Path) -> tuple[Any, Callable[[str], list[int]]]:
    """Mistral's own form, which transformers converts; Mistral reads it with tiktoken."""
    from transformers.integrations.mistral.tokenizer import MistralConverter

    library = _needed("tiktoken")
    backend = MistralConverter(str(file)).converted()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    for role, token in zip(_ROLES, ("<s>", "</s>", "<unk>", "<pad>"), strict=True):
        if backend.token_to_id(token) is not None:
            setattr(tokenizer, role, token)
    frame(tokenizer, bos=True, eos=False)
    if not any(file.with_name(name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        tokenizer.chat_template = _mistral_template(file)
    said = _read(file)
    special = backend.token_to_id(_byte_token(said["vocab"][0]))
    known = backend.get_vocab_size() - special
    encoding = library.Encoding(
        "tekken",
        pat_str=said["config"]["pattern"],
        mergeable_ranks={
            base64.b64decode(each["token_bytes"]): each["rank"] for each in said["vocab"][:known]
        },
        special_tokens={},
    )
    return tokenizer, lambda text: [special + token for token in encoding.encode(text)]


def _byte_token(entry: dict[str, Any]) -> str:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    return "".join(letters[byte] for byte in base64.b64decode(entry["token_bytes"]))


def _mistral_template(file: Path) -> str | None:
    """The chat template that Mistral's own package writes for the file, where it is installed."""
    try:
        module = importlib.import_module("mistral_common.integrations.chat_templates.chat_templates")
    except ImportError:
        return None
    try:
        template: str = module.convert_tokenizer_to_chat_template(file)
    except ValueError:  # it knows none for this version of the file
        return None
    return template


def _tiktoken(file: Path, config: dict[str, Any], kind: str | None) -> tuple[Any, Callable[[str], list[int]]]:
    """OpenAI's form, which holds ranks of byte strings but not how text is cut: known only for Llama 3."""
    if kind not in ("llama", "mllama"):
        raise ValueError(f"{file.name} does not say how it cuts text, nor is that known of {kind} models")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    library = _needed("tiktoken")
    ranks = importlib.import_module("tiktoken.load").load_tiktoken_bpe(str(file))
    added = {int(index): said["content"] for index, said in config.get("added_tokens_decoder", {}).items()}
    if sorted(added) != list(range(len(ranks), len(ranks) + len(added))) or not added:
        raise ValueError(f"tokenizer_config.json does not name the special tokens that follow {file.name}'s")
    converter = TikTokenConverter(str(file), extra_special_tokens=[added[index] for index in sorted(added)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=converter.converted())
    _set_roles(tokenizer, config, {})
    frame(tokenizer, bos=True, eos=False)
    tokenizer.chat_template = _template(config)
    encoding = library.Encoding(
        "tiktoken", pat_str=converter.pattern, mergeable_ranks=ranks, special_tokens={}
    )
    return tokenizer, encoding.encode


def _by_class(folder: Path) -> Any:
    """The tokenizer of transformers' own class for the model, where there is such a class."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of any kind, and over several lines
        raise ValueError("transformers has no class that reads them") from error
    if not tokenizer.is_fast:
        raise ValueError(f"transformers has only a slow tokenizer for them ({type(tokenizer).__name__})")
    if type(tokenizer) is transformers.TokenizersBackend:
        raise ValueError("transformers has no class that reads them")
    listed = _read(folder / "vocab.json")
    known = tokenizer.get_vocab()
    if not listed or any(known.get(token) != index for token, index in listed.items()):
        raise ValueError(f"{type(tokenizer).__name__} of transformers does not take them as they are")
    return tokenizer


def _set_roles(tokenizer: Any, config: dict[str, Any], otherwise: dict[str, str | None]) -> None:
    for role in _ROLES:
        said = config.get(role, otherwise.get(role))
        token = said.get("content") if isinstance(said, dict) else said
        if token is not None and not isinstance(token, str):
            raise ValueError(f"tokenizer_config.json or special_tokens_map.json: {role} is {quoted(token)}")
        setattr(tokenizer, role, token)


def _template(config: dict[str, Any]) -> str | dict[str, str] | None:
    template: str | list[dict[str, str]] | None = config.get("chat_template")
    if isinstance(template, list):
        return {each["name"]: each["template"] for each in template}
    return template


def _needed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"the package {package} is needed to check the result: pip install {package}, then start again"
        ) from error


def _read(file: Path) -> dict[str, Any]:
    return read_object(file) if file.is_file() else {}


def main() -> None:
    """The program."""
    source, target = arguments()
    transformers.logging.set_verbosity_error()
    try:
        convert(source, target)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        sys.exit(reason)


if __name__ == "__main__":
    main()
