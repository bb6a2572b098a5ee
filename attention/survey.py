"""The backends that work on this machine with this model, and why the others do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from attention.kernel_choice import KernelChoice, Place
from attention.names import load_backend, registries
from attention.registry import Registry, UnsupportedError, described, imported
from attention.types import LayerSpec


class Verdict(NamedTuple):
    """One backend with one set of options.

    Attributes:
        backend: its name.
        origin: the package that brings it, with its version; empty for Longspan's own.
        options: those in force, defaults included; after a refusal, those that were given.
        order: the kernels that ``auto`` tries, in this order.
        kernels: for each kernel that may be asked for, all reasons why it cannot compute this; none if it
            can.
        products: for kernels that can, of what prompts' products are where rounding is allowed, as with
            packed weights; see ``Kernel.products``.
        refusal: why the backend cannot be made of these options at all, or ``None``.
    """

    backend: str
    origin: str
    options: dict[str, str]
    order: tuple[str, ...]
    kernels: dict[str, list[str]]
    products: dict[str, str]
    refusal: str | None

    @property
    def auto(self) -> str | None:
        """The kernel that ``auto`` takes, if any can."""
        return next((name for name in self.order if not self.kernels[name]), None)


def survey(
    layers: list[LayerSpec],
    device: torch.device | str,
    dtype: torch.dtype,
    page_size: int,
    *,
    backend: str | None = None,
    options: Mapping[str, str] | None = None,
) -> list[Verdict]:
    """A verdict for every backend, or for each pattern of a family of them, with every kernel.

    Args:
        layers: the model's attention layers.
        device: where the cache would live.
        dtype: dtype of the cache.
        page_size: tokens per page.
        backend: survey only this one.
        options: given to each backend; ``None`` for its defaults.

    Raises:
        UnsupportedError: there is no backend of this name.
    """
    place = Place(layers, torch.device(device), dtype, page_size)
    backends, kernels = registries()
    if backend is not None and backend not in backends.names:
        backends.load(backend)  # raises the error, with the known names
    verdicts = []
    for name in backends.names if backend is None else [backend]:
        try:
            variants = _variants(backends, name, dict(options or {}))
        except UnsupportedError as error:
            verdicts.append(Verdict(name, backends.origin(name), dict(options or {}), (), {}, {}, str(error)))
            continue
        verdicts += [_verdict(backends, kernels, name, given, place) for given in variants]
    return verdicts


def _verdict(
    backends: Registry, kernels: Registry, name: str, options: dict[str, str], place: Place
) -> Verdict:
    origin = backends.origin(name)
    try:
        choice = KernelChoice(backends, kernels, name, options, place)
    except UnsupportedError as error:
        return Verdict(name, origin, options, (), {}, {}, str(error))
    reasons = {kernel: choice.reasons(kernel) for kernel in choice.selectable}
    able = {kernel: choice.kernel(kernel) for kernel in reasons if not reasons[kernel]}
    rounded = {kernel: able[kernel].with_rounded_products().products(place.dtype) for kernel in able}
    products = {kernel: made for kernel, made in rounded.items() if made}
    return Verdict(name, origin, choice.options, choice.order, reasons, products, None)


def _variants(backends: Registry, name: str, options: dict[str, str]) -> list[dict[str, str]]:
    """The options as they are, or once for each pattern of a family."""
    family = load_backend(backends, name).family
    if family is None or "pattern" in options:
        return [options]
    try:
        return [{"pattern": pattern, **options} for pattern in imported(family)]
    except Exception as error:
        origin = backends.origin(name)
        if not origin:
            raise
        raise UnsupportedError(
            f"backend {name} of {origin} cannot name its patterns: {described(error)}; "
            "repair or uninstall that package"
        ) from error
