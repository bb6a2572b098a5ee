"""What a folder says of embeddings beside the model: the files of the sentence-transformers library."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.encoder_messages import Pooling
from server.errors import RefusedError
from server.models.json_file import read_json, read_object

log = logging.getLogger("longspan.models")

_POOLINGS = {
    "mean": Pooling.MEAN,
    "mean_tokens": Pooling.MEAN,
    "cls": Pooling.CLS,
    "cls_token": Pooling.CLS,
    "lasttoken": Pooling.LAST,
}
_ELSE = "choose a model of Transformer, Pooling and Normalize alone"


@dataclass(frozen=True, slots=True)
class SentenceFiles:
    """How the model's makers turn its tokens' vectors into one.

    Attributes:
        pooling: mean where the folder says nothing.
        normalized: whether embeddings have length 1.
        longest: tokens of the longest text that the makers used; ``None`` where they don't say.
    """

    pooling: Pooling
    normalized: bool
    longest: int | None


def read_sentence_files(folder: Path) -> SentenceFiles:
    """Reads ``modules.json`` and the files that it names.

    Raises:
        RefusedError: they ask for what is not computed here, or can't be read.
    """
    transformer = _read(folder / "sentence_bert_config.json")
    longest = transformer.get("max_seq_length")
    if longest is not None and (type(longest) is not int or longest < 1):
        raise RefusedError(
            f"sentence_bert_config.json in {folder} has max_seq_length {str(longest)[:80]}, which is no "
            "number of tokens; fetch the model again"
        )
    if transformer.get("do_lower_case"):
        raise RefusedError(
            f"sentence_bert_config.json in {folder} asks for texts in lower case, which is not done here; "
            "choose a model whose tokenizer does it"
        )
    modules = _read_modules(folder / "modules.json")
    pooling, normalized = Pooling.MEAN, False
    for module in modules:
        kind = str(module.get("type")).rpartition(".")[2]
        if kind == "Pooling":
            pooling = _pooling(folder / _folder_name(folder, module.get("path")) / "config.json")
        elif kind == "Normalize":
            normalized = True
        elif kind != "Transformer":
            raise RefusedError(
                f"modules.json in {folder} has a {kind[:80]}, which is not computed here; {_ELSE}"
            )
    prompts = _read(folder / "config_sentence_transformers.json").get("prompts") or {}
    if not isinstance(prompts, dict):
        raise RefusedError(
            f"config_sentence_transformers.json in {folder} can't be read: its prompts are no texts by name; "
            "fetch the model again"
        )
    if told := {name: text for name, text in prompts.items() if text}:
        log.info("the model's makers begin texts with prompts, which clients have to send: %.1000s", told)
    return SentenceFiles(pooling, normalized, longest)


def _folder_name(folder: Path, name: Any) -> str:
    """Refuses what could lie elsewhere than in the model's folder."""
    if not isinstance(name, str) or Path(name).name != name or name == "..":
        raise RefusedError(
            f"modules.json in {folder} has the path {str(name)[:80]!r}, which is no name of a folder beside "
            "it; fetch the model again"
        )
    return name


def _pooling(path: Path) -> Pooling:
    """The one mode that is asked for: by a name or names, or in older files by flags."""
    config = _read(path)
    given = config.get("pooling_mode")
    flags = [name.removeprefix("pooling_mode_") for name, value in config.items() if value is True]
    asked = [given] if isinstance(given, str) else given if isinstance(given, list) else flags
    asked = [str(name) for name in asked if name != "include_prompt"]
    if len(asked) != 1 or asked[0] not in _POOLINGS:
        raise RefusedError(
            f"{path} asks for pooling by {' and '.join(asked)[:200] or 'nothing'}; here it is the mean, "
            "the first token (cls) or the last one; choose another model"
        )
    return _POOLINGS[asked[0]]


def _read_modules(path: Path) -> list[dict[str, Any]]:
    content = read_json(path) if path.exists() else []
    if not isinstance(content, list) or not all(isinstance(module, dict) for module in content):
        raise RefusedError(f"{path} can't be read: it holds no list of modules; fetch the model again")
    return content


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}
