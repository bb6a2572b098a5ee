"""transformers' class for tokenizers, imported without a look through all of its models.

Importing transformers reads what every model's files define, so that any of their names can be asked of it.
That takes half a second of processor time and more. The server process asks for one name, of a module
that has no need of it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from typing import Any

_PACKAGE = "transformers"
_MODULE = "transformers.tokenization_utils_tokenizers"


def tokenizer_class() -> Any:
    """``transformers.PreTrainedTokenizerFast``.

    transformers is not imported after that, unless it was before; its modules that are stay so, and it works
    with them if it is imported later. Meanwhile no other thread may import it.
    """
    if _PACKAGE not in sys.modules:
        try:
            return _alone()
        except Exception:  # another version, whose module needs the package, or is another one
            for name in [name for name in sys.modules if name.split(".")[0] == _PACKAGE]:
                del sys.modules[name]
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast


def _alone() -> Any:
    """It from its module, while in the package's place stands an empty one, with its version."""
    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None
    package: Any = importlib.util.module_from_spec(spec)
    package.__version__ = importlib.metadata.version(_PACKAGE)
    sys.modules[_PACKAGE] = package
    try:
        return importlib.import_module(_MODULE).PreTrainedTokenizerFast
    finally:
        sys.modules.pop(_PACKAGE, None)
