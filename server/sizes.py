"""Sizes that depend on the device where no setting gives them."""

from __future__ import annotations

from typing import NamedTuple

from server.settings import Settings


class Sizes(NamedTuple):
    """In force on a device.

    Attributes:
        page_size: tokens per page of the KV cache.
        kv_memory_share: share of the memory free after loading that the KV cache may take.
        max_batch_tokens: tokens computed per engine step, at most.
        max_running: sequences worked on at once, at most.
    """

    page_size: int
    kv_memory_share: float
    max_batch_tokens: int
    max_running: int

    @classmethod
    def of(cls, settings: Settings, device: str) -> Sizes:
        """Those that settings give, and the device's own for the others.

        Every running sequence needs a token per step: of the two sizes, one that is not given follows the
        other.

        Args:
            settings: of the server.
            device: ``cpu`` or ``cuda``.
        """
        usual = _ON_CPU if device == "cpu" else _ON_GPU
        given = {name: getattr(settings, name) for name in cls._fields}
        sizes = usual._replace(**{name: value for name, value in given.items() if value is not None})
        if settings.max_batch_tokens is None:
            sizes = sizes._replace(max_batch_tokens=max(sizes.max_batch_tokens, sizes.max_running))
        elif settings.max_running is None:
            sizes = sizes._replace(max_running=min(sizes.max_batch_tokens, sizes.max_running))
        return sizes


# A CPU's memory is its machine's, which has other uses; small pages share more of a prefix.
_ON_CPU = Sizes(page_size=16, kv_memory_share=0.3, max_batch_tokens=512, max_running=64)
# As GPU servers of the field have them: most of the memory, and steps and batches that keep the device busy.
# A page is a tile of Triton's kernel.
_ON_GPU = Sizes(page_size=64, kv_memory_share=0.85, max_batch_tokens=4096, max_running=256)
