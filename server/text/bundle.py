"""A tokenizer's files in one zip archive, for a gateway that tokenizes by itself."""

from __future__ import annotations

import io
import zipfile

from server.text.tokenizer import Tokenizer

# Beside the tokenizer itself. No weights, and nothing else that a model's folder may have.
_FILES = ("tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json")


def bundle(tokenizer: Tokenizer) -> bytes:
    """The archive: tokenizer and chat template as they are in use here, which files may not be.

    A published tokenizer may pad all texts to one length, and the operator may have chosen another template.

    Args:
        tokenizer: one with text.

    Raises:
        OSError: a file can't be read.
    """
    folder = tokenizer.folder
    assert folder is not None
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tokenizer.json", tokenizer.to_json())
        for name in _FILES:
            if (folder / name).is_file():
                archive.write(folder / name, name)
        if tokenizer.chat_template is not None:
            archive.writestr("chat_template.jinja", tokenizer.chat_template)
    return buffer.getvalue()
