"""The backends and kernels by name, and the checks that need only names and options.

Imports no torch, so that a server can refuse them before it has an engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attention.registry import Backend, Registry, UnsupportedError, imported, unknown

# The order of the kernels is that in which auto tries them: kernels that read pages in place come before
# sdpa, which gathers them at every step.
BACKENDS: dict[str, Backend] = {
    "full": Backend(
        "attention.patterns.full:Full.from_options",
        ("cpu_paged", "flash_attn", "triton", "sdpa", "reference"),
        read="attention.patterns.declared:read_none",
    ),
    "flash": Backend(
        "attention.patterns.full:Full.from_options",
        ("cpu_paged", "flash_attn", "varlen", "sdpa_flash", "triton"),
        read="attention.patterns.declared:read_none",
    ),
    "xformers": Backend(
        "attention.patterns.full:Full.from_options",
        ("xformers",),
        read="attention.patterns.declared:read_none",
    ),
    "sliding_window": Backend(
        "attention.patterns.sliding_window:SlidingWindow.from_options",
        ("cpu_paged", "flash_attn", "triton", "sdpa", "reference"),
        read="attention.patterns.declared:SLIDING_WINDOW.read",
    ),
    "sparse": Backend(
        "attention.patterns.sparse:from_options",
        ("cpu_paged", "triton", "sdpa", "reference"),
        family="attention.patterns.declared:SPARSE",
        read="attention.patterns.declared:read_sparse",
    ),
}

KERNELS: dict[str, str] = {
    "cpu_paged": "attention.kernels.cpu.paged:CpuPaged",
    "triton": "attention.kernels.triton_paged:Triton",
    "sdpa": "attention.kernels.sdpa:Sdpa",
    "reference": "attention.kernels.reference:Reference",
    "flash_attn": "attention.kernels.flash_attn:FlashAttn",
    "varlen": "attention.kernels.varlen:Varlen",
    "sdpa_flash": "attention.kernels.sdpa_flash:SdpaFlash",
    "xformers": "attention.kernels.xformers:Xformers",
}


def registries() -> tuple[Registry, Registry]:
    """All backends and all kernels there are, those of installed packages included."""
    return Registry("backend", BACKENDS), Registry("kernel", KERNELS)


def check_names(backend: str, options: Mapping[str, str], kernel: str) -> None:
    """Refuses what ``attention.resolve`` refuses regardless of model and machine.

    Args:
        backend: as of ``resolve``; its options are checked only if it has ``Backend.read``.
        options: as of ``resolve``.
        kernel: as of ``resolve``.

    Raises:
        UnsupportedError: a name or option is unknown, or the kernel is not one of the backend's.
    """
    backends, kernels = registries()
    entry = load_backend(backends, backend)
    if entry.read is not None:
        try:
            imported(entry.read)(options)
        except ValueError as error:
            raise UnsupportedError(str(error)) from error
    check_kernel(kernel, backend, selectable(backends, kernels, backend))


def check_kernel(kernel: str, backend: str, names: Sequence[str]) -> None:
    """Refuses a kernel that is none of those that may be asked for with a backend.

    Raises:
        UnsupportedError: it is neither ``auto`` nor one of ``names``.
    """
    if kernel in ("auto", *names):
        return
    if kernel not in KERNELS:
        raise UnsupportedError(unknown("attention kernel", kernel, ("auto", *names)))
    ways = ["kernel auto", *names]
    ways += [f"attention {name}" for name, entry in BACKENDS.items() if kernel in entry.kernels]
    raise UnsupportedError(
        f"kernel {kernel} does not compute {backend} attention; choose {' or '.join(ways)}"
    )


def load_backend(backends: Registry, name: str) -> Backend:
    """The backend of this name.

    Raises:
        UnsupportedError: there is none, or its package is broken.
    """
    entry = backends.load(name)
    if not isinstance(entry, Backend):
        raise UnsupportedError(
            f"backend {name} of {backends.origin(name)} is {type(entry).__name__}, not an attention.Backend; "
            "repair or uninstall that package"
        )
    return entry


def order(backends: Registry, name: str) -> tuple[str, ...]:
    """Names of a backend's kernels, in the order in which ``auto`` tries them.

    Raises:
        UnsupportedError: there is no such backend, or its package is broken.
    """
    return load_backend(backends, name).kernels or load_backend(backends, "sparse").kernels


def selectable(backends: Registry, kernels: Registry, name: str) -> list[str]:
    """Kernels that may be asked for with a backend: those of its order, and those of installed packages.

    Raises:
        UnsupportedError: there is no such backend, or its package is broken.
    """
    return list(dict.fromkeys([*order(backends, name), *kernels.foreign]))
