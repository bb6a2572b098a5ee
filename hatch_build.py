"""Compiles the native code into the wheel, at every level of this machine's architecture.

Where LONGSPAN_CACHE_DIR is set, compiled libraries are kept there, as by a source checkout. An editable
install carries none: there the code is compiled at first use.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_PACKAGES = ("attention", "server")


class NativeBuildHook(BuildHookInterface):
    """See above; run for wheels, as pyproject.toml says."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles, and adds the libraries beside their sources."""
        if version == "editable":
            return
        root = Path(self.root)
        levels, compiling = _module(root, "levels"), _module(root, "compiling")
        try:
            compiler = compiling.compiler()
            known = [level for level in levels.of_machine() if compiling.accepts(level.arguments)]
            if not known:
                raise compiling.NativeError(f"{compiler[0]} compiles for no processor of this architecture")
        except compiling.NativeError as error:
            self.app.display_warning(
                f"The wheel carries no compiled code, so that servers need a C++ compiler: {error}."
            )
            return
        self._made = tempfile.TemporaryDirectory()
        cache = os.environ.get("LONGSPAN_CACHE_DIR")
        folder = Path(cache, "kernels").expanduser() if cache else Path(self._made.name)
        sources = [path for package in _PACKAGES for path in sorted((root / package).rglob("*.cpp"))]
        if unknown := ", ".join(level.name for level in levels.of_machine() if level not in known):
            self.app.display_warning(f"The compiler is too old for {unknown}; the wheel carries the others.")
        wanted = [(source, level) for source in sources for level in known]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            built = pool.map(lambda one: compiling.compiled(one[0], one[1].arguments, folder), wanted)
            for (source, level), library in zip(wanted, built, strict=True):
                target = compiling.packaged(source, level.name, level.arguments)
                build_data["force_include"][str(library)] = str(target.relative_to(root))
        build_data["pure_python"] = False
        # No part of it depends on the version of Python, only on the platform.
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Removes the files compiled only for this wheel."""
        if hasattr(self, "_made"):
            self._made.cleanup()


def _module(root: Path, name: str) -> ModuleType:
    """A file of the package by itself: the package imports torch, which a build environment lacks."""
    spec = importlib.util.spec_from_file_location(name, root / "attention/kernels/cpu" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
