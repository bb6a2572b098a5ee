"""Modules of transformers for a process that needs none of its models.

``import transformers`` reads the source of all its models, some 2,500 files, to learn which names they have.
A tokenizer or a chat template needs none of them. So the package is entered without its own code, which runs
as soon as something asks the package for a name that is no module of it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import threading
from types import ModuleType
from typing import Any

_NAME = "transformers"
_lock = threading.Lock()


class _Entered(ModuleType):
    """The package before its own code has run."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {_NAME!r} has no attribute {name!r}")
        if sys.modules.get(_NAME) is self and importlib.util.find_spec(f"{_NAME}.{name}") is not None:
            return importlib.import_module(f"{_NAME}.{name}")
        return getattr(_whole(self), name)

    def __dir__(self) -> list[str]:
        return dir(_whole(self))


def _whole(entered: _Entered) -> ModuleType:
    """The package, its own code run; its modules that have been imported stay as they are."""
    with _lock:
        if sys.modules.get(_NAME) is entered:
            del sys.modules[_NAME]
    try:
        return importlib.import_module(_NAME)
    except BaseException:
        sys.modules.setdefault(_NAME, entered)
        raise


def module(name: str) -> ModuleType:
    """A module of transformers, by its name within it, such as ``utils.chat_template_utils``.

    Where transformers has been imported already, it is used as it is.

    Raises:
        ImportError: there is none, or a package that it needs is absent or too old.
    """
    with _lock:
        if _NAME not in sys.modules and (spec := importlib.util.find_spec(_NAME)) is not None:
            entered = _Entered(_NAME)
            entered.__spec__, entered.__loader__, entered.__package__ = spec, spec.loader, _NAME
            entered.__file__, entered.__path__ = spec.origin, list(spec.submodule_search_locations or ())
            vars(entered)["__version__"] = importlib.metadata.version(_NAME)
            sys.modules[_NAME] = entered
    if isinstance(package := sys.modules.get(_NAME), _Entered):
        try:
            importlib.import_module(f"{_NAME}.dependency_versions_check")  # as its own code begins
        except BaseException:
            if sys.modules.get(_NAME) is package:
                del sys.modules[_NAME]
            raise
    return importlib.import_module(f"{_NAME}.{name}")
