"""A folder's settings of embeddings beside the model: the files of the sentence-transformers library."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.encoder_messages import Pooling
from server.errors import RefusedError, quoted
from server.models.json_file import is_unicode, read_json, read_object

log = logging.getLogger("longspan.models")

_POOLINGS = {
    "mean": Pooling.MEAN,
    "mean_tokens": Pooling.MEAN,
    "cls": Pooling.CLS,
    "cls_token": Pooling.CLS,
    "lasttoken": Pooling.LAST,
}
# Of all prompts together: each answer to GetModelInfo has them.
_MOST_CHARACTERS = 64 << 10
_ELSE = "choose a model of Transformer, Pooling and Normalize alone"


@dataclass(frozen=True, slots=True)
class SentenceFiles:
    """How the model's makers turn its tokens' vectors into one.

    Attributes:
        pooling: mean where the folder says nothing.
        normalized: whether embeddings have length 1.
        longest: tokens of the longest text that the makers used; ``None`` where they don't say.
        prompts: by name, texts with which embedded texts begin.
        default_prompt: the name of the one that texts begin with where a request names none.
    """

    pooling: Pooling
    normalized: bool
    longest: int | None
    prompts: Mapping[str, str]
    default_prompt: str | None


def has_pooling(folder: Path) -> bool:
    """Whether a folder says how a text's vectors become one, as those made for embeddings do.

    Raises:
        RefusedError: its ``modules.json`` can't be read.
    """
    return bool(pooling_folders(folder))


def pooling_folders(folder: Path) -> list[str]:
    """The folders beside the model, by name, whose ``config.json`` says so.

    Raises:
        RefusedError: ``modules.json`` can't be read, or names a folder elsewhere.
    """
    modules = _read_modules(folder / "modules.json")
    return [_folder_name(folder, module.get("path")) for module in modules if _kind(module) == "Pooling"]


def read_sentence_files(folder: Path) -> SentenceFiles:
    """Reads ``modules.json`` and the files that it names.

    Raises:
        RefusedError: they ask for what is not computed here, or can't be read.
    """
    transformer = _read(folder / "sentence_bert_config.json")
    longest = transformer.get("max_seq_length")
    if longest is not None and (type(longest) is not int or longest < 1):
        raise RefusedError(
            f"sentence_bert_config.json in {folder} has max_seq_length {quoted(longest)}, which is no "
            "number of tokens; fetch the model again"
        )
    if transformer.get("do_lower_case"):
        raise RefusedError(
            f"sentence_bert_config.json in {folder} asks for texts in lower case, which is not done here; "
            "choose a model whose tokenizer does it"
        )
    modules = _read_modules(folder / "modules.json")
    pooling, normalized = Pooling.MEAN, False
    excluded = False
    for module in modules:
        kind = _kind(module)
        if kind == "Pooling":
            pooling, excluded = _pooling(folder / _folder_name(folder, module.get("path")) / "config.json")
        elif kind == "Normalize":
            normalized = True
        elif kind != "Transformer":
            raise RefusedError(
                f"modules.json in {folder} has a {kind[:80]}, which is not computed here; {_ELSE}"
            )
    prompts, default = _prompts(folder / "config_sentence_transformers.json")
    if excluded and pooling is not Pooling.LAST and any(prompts.values()):
        raise RefusedError(
            f"the Pooling in {folder} leaves a prompt's own tokens out (include_prompt), which is not done "
            "here; choose another model"
        )
    return SentenceFiles(pooling, normalized, longest, prompts, default)


def _prompts(path: Path) -> tuple[dict[str, str], str | None]:
    config = _read(path)
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(map(_is_text, [*prompts, *prompts.values()])):
        raise RefusedError(f"{path} can't be read: its prompts are no texts by name; fetch the model again")
    if sum(len(name) + len(text or "") for name, text in prompts.items()) > _MOST_CHARACTERS:
        raise RefusedError(
            f"the prompts in {path} have more than {_MOST_CHARACTERS} characters; shorten them"
        )
    default = config.get("default_prompt_name")
    if default is not None and (not isinstance(default, str) or default not in prompts):
        raise RefusedError(
            f"{path} names the default prompt {quoted(default)}, which is not among its prompts; "
            "fetch the model again"
        )
    return {name: text or "" for name, text in prompts.items()}, default


def _is_text(prompt: Any) -> bool:
    return prompt is None or (isinstance(prompt, str) and is_unicode(prompt))


def _kind(module: dict[str, Any]) -> str:
    return str(module.get("type")).rpartition(".")[2]


def _folder_name(folder: Path, name: Any) -> str:
    """Refuses what could lie elsewhere than in the model's folder."""
    if not isinstance(name, str) or Path(name).name != name or name == "..":
        raise RefusedError(
            f"modules.json in {folder} has the path {quoted(name)}, which is no name of a folder beside "
            "it; fetch the model again"
        )
    return name


def _pooling(path: Path) -> tuple[Pooling, bool]:
    """The one mode that is asked for, and whether without prompts: by names, or in older files by flags."""
    config = read_object(path)
    given = config.get("pooling_mode")
    flags = [name.removeprefix("pooling_mode_") for name, value in config.items() if value is True]
    asked = [given] if isinstance(given, str) else given if isinstance(given, list) else flags
    asked = [str(name) for name in asked if name != "include_prompt"]
    if len(asked) != 1 or asked[0] not in _POOLINGS:
        raise RefusedError(
            f"{path} asks for pooling by {' and '.join(asked)[:200] or 'nothing'}; here it is the mean, "
            "the first token (cls) or the last one; choose another model"
        )
    return _POOLINGS[asked[0]], config.get("include_prompt") is False


def _read_modules(path: Path) -> list[dict[str, Any]]:
    content = read_json(path) if path.exists() else []
    if not isinstance(content, list) or not all(isinstance(module, dict) for module in content):
        raise RefusedError(f"{path} can't be read: it holds no list of modules; fetch the model again")
    return content


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}
