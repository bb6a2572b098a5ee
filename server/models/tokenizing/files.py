"""The files of a model's tokenizer: its own, or those that other tokenizer files are converted to, once."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

from server.errors import RefusedError
from server.models.cache import Report, make_once
from server.models.conversions import ConversionError, run_conversion

READY = "tokenizer.json"
"""The file that a tokenizer is served from."""

# Any of these holds a vocabulary.
_VOCABULARIES = ("*.model", "*.spm", "*.tiktoken", "tekken.json", "vocab.json", "vocab.txt")
# Other files that say how text is treated.
_ALSO = (
    *("config.json", "generation_config.json", "merges.txt", "added_tokens.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "processor_config.json", "chat_template.*", "additional_chat_templates/*"),
)
# Raised when conversion changes, so that the files of older versions are made again.
_VERSION = 2


def find_tokenizer(folder: Path, cache_dir: Path, report: Report) -> Path | None:
    """The folder with the model's ``tokenizer.json``, and with its configs: its own, or one in the cache.

    Args:
        folder: of the model. Nothing is written there.
        cache_dir: of the settings.
        report: told of a conversion.

    Returns:
        The folder, or ``None`` where the model has no tokenizer at all.

    Raises:
        RefusedError: its tokenizer files can't be converted; the sentence says why, and what to do.
    """
    if (folder / READY).is_file():
        return folder
    files = _matching(folder, _VOCABULARIES)
    if not files and (folder / "tokenizer_config.json").is_file():
        raise RefusedError(
            f"{folder} has a tokenizer_config.json but no vocabulary, such as tokenizer.json; fetch the "
            "model again, or move tokenizer_config.json away: then the model serves token ids"
        )
    if not files:
        return None
    files = sorted({*files, *_matching(folder, _ALSO)})
    digest = hashlib.sha256(f"{_VERSION} {importlib.metadata.version('transformers')}".encode())
    for file in files:
        content = file.read_bytes()
        digest.update(f"\n{file.relative_to(folder)} {len(content)}\n".encode())
        digest.update(content)
    target = cache_dir / "tokenizers" / f"{folder.name.lower()}-{digest.hexdigest()[:16]}"
    return make_once(target, lambda partial: _convert(folder, partial, report), report)


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [file for pattern in patterns for file in folder.glob(pattern) if file.is_file()]


def _convert(folder: Path, target: Path, report: Report) -> None:
    report("converting the tokenizer", None)
    try:
        run_conversion("server.models.tokenizing.convert", folder, target, lambda line: None)
    except ConversionError as error:
        raise RefusedError(
            f"{folder} has no tokenizer.json, and its other tokenizer files can't be converted: {error}; "
            "put the model's tokenizer.json beside them, or move them away: then the model serves token ids"
        ) from error
