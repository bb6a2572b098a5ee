"""Calls of native functions, recorded with all memory that they touch, to be made by native_driver.cpp."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from attention.kernels.cpu import calls, select
from server.models.quantized import native as quantized

PARALLEL, BARRIER = -1, -2
ITEM = {0: 4, 1: 2, 2: 2, 3: 1}  # bytes of a number, by the native calls' numbers of dtypes
SOURCES = {
    Path(calls.__file__).with_name("paged.cpp"): ("longspan_attend", "longspan_write"),
    Path(calls.__file__).with_name("select.cpp"): ("longspan_update", "longspan_select"),
    Path(quantized.__file__).with_name("linear.cpp"): ("longspan_run", "longspan_pack", "longspan_look_up"),
}


@dataclass
class Recorded:
    """A call.

    Attributes:
        function: its index among those of its source.
        buffers: memory before the call; the first is the structure itself.
        pointers: buffer, offset in it, and the buffer that it points to, PARALLEL or BARRIER.
        outputs: indices of the buffers that the call fills, with what it left there here.
    """

    function: int
    buffers: list[bytes] = field(default_factory=list)
    pointers: list[tuple[int, int, int]] = field(default_factory=list)
    outputs: dict[int, bytes] = field(default_factory=dict)

    def add(self, structure: ctypes.Structure, sizes: dict[str, int], at: int = 0, offset: int = 0) -> None:
        """Memory that ``structure`` points to, which lies at ``offset`` of the buffer ``at``."""
        for name, size in sizes.items():
            address = getattr(structure, name)
            if not address:
                continue
            place = offset + getattr(type(structure), name).offset
            self.pointers.append((at, place, len(self.buffers)))
            self.buffers.append(ctypes.string_at(address, size))

    def calls_threads(self, structure: ctypes.Structure) -> None:
        """Its threads are the driver's."""
        for name, target in (("parallel", PARALLEL), ("barrier", BARRIER)):
            if hasattr(type(structure), name):
                self.pointers.append((0, getattr(type(structure), name).offset, target))


def _queries(call: Any, rows: int) -> int:
    last = (rows - 1) * call.row_stride + (call.query_heads - 1) * call.head_stride
    return (last + call.head_size) * 4


def _attend(call: Any, rows: int, pages: int) -> tuple[dict[str, int], tuple[str, ...]]:
    tokens, item = pages * call.page_size, ITEM[call.dtype]
    entries = call.entries * 8
    return {
        "query": _queries(call, rows),
        "rerotated": _queries(call, rows),
        "keys": tokens * call.kv_heads * call.head_size * item,
        "values": tokens * call.kv_heads * call.value_size * item,
        "page_table": -1,
        "rows": entries,
        "owners": entries,
        "ranges": entries * call.range_heads * call.range_count * 2,
        "given": rows,
        "sinks": call.query_heads * 4,
        "output": rows * call.query_heads * call.value_size * 4,
    }, ("output",)


def _write(call: Any, rows: int, pages: int) -> tuple[dict[str, int], tuple[str, ...]]:
    # As many slots as rows.
    return {
        "key": ((call.rows - 1) * call.key_stride + call.key_numbers) * 4,
        "value": ((call.rows - 1) * call.value_stride + call.value_numbers) * 4,
        "keys": call.rows * call.key_numbers * ITEM[call.dtype],
        "values": call.rows * call.value_numbers * ITEM[call.dtype],
        "slots": call.rows * 8,
    }, ("keys", "values")


def _update(call: Any, rows: int, pages: int) -> tuple[dict[str, int], tuple[str, ...]]:
    numbers = call.kv_heads * call.head_size * ITEM[call.dtype]
    return {
        "keys": pages * call.page_size * numbers,
        "summary": pages * 2 * numbers,
        "pages": call.count * 8,
    }, ("summary",)


def _select(call: Any, rows: int, pages: int) -> tuple[dict[str, int], tuple[str, ...]]:
    entries = call.entries * 8
    return {
        "query": ((rows - 1) * call.row_stride + (call.query_heads - 1) * call.head_stride + call.head_size)
        * 4,
        "summary": pages * 2 * call.kv_heads * call.head_size * ITEM[call.dtype],
        "page_table": -1,
        "rows": entries,
        "owners": entries,
        "positions": entries,
        "ranges": entries * call.kv_heads * (call.selected + 2) * 2,
    }, ("ranges",)


def _weights(call: Any) -> dict[str, int]:
    panels, groups = -(-call.outputs // 16), -(-call.inputs // 32)
    return {
        "codes": panels * groups * 64 * call.bits,
        "scales": panels * groups * (64 if call.bits == 4 else 32),
    }


def _pack(call: Any) -> tuple[dict[str, int], tuple[str, ...]]:
    return {"weights": call.outputs * call.inputs * 4, **_weights(call)}, ("codes", "scales")


def _look_up(call: Any) -> tuple[dict[str, int], tuple[str, ...]]:
    output = {"ids": call.rows * 8, "output": call.rows * call.inputs * 4}
    return output | _weights(call), ("output",)


def _linear(run: Any) -> tuple[dict[str, int], tuple[str, ...]]:
    stage = quantized.Stage.from_address(run.stages)
    assert run.count == 1
    assert not stage.cosines
    return {
        "input": ((run.rows - 1) * stage.input_stride + stage.inputs) * 4,
        "bias": stage.outputs * 4,
        "output": ((run.rows - 1) * stage.output_stride + stage.outputs) * 4,
        **_weights(stage),
    }, ("output",)


class Recorder:
    """What is called between ``recording`` is kept.

    Attributes:
        made: the calls by source file.
        rows: of queries in the calls that follow.
        pages: of the cache.
        sequences: of the batch.
    """

    def __init__(self) -> None:
        self.made: dict[Path, list[Recorded]] = {source: [] for source in SOURCES}
        self.rows = self.pages = self.sequences = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Native calls of attention, selection and linear layers are recorded and made."""
        paged, chosen, linear = calls.compiled(), select.compiled(), quantized._compiled()
        one, two, three = SOURCES
        sized = (_attend, _write, _update, _select)
        attend, write, update, selects = (
            lambda call, how=how: how(call, self.rows, self.pages) for how in sized
        )
        attending = paged._replace(
            attend=self._of(one, 0, paged.attend, attend), write=self._of(one, 1, paged.write, write)
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("attention.kernels.cpu.paged.compiled", lambda: attending)
            patch.setattr(calls, "compiled", lambda: attending)
            choosing = chosen._replace(
                update=self._of(two, 0, chosen.update, update),
                select=self._of(two, 1, chosen.select, selects),
            )
            patch.setattr(select, "compiled", lambda: choosing)
            operator = linear._replace(
                run=self._of(three, 0, linear.run, _linear),
                pack=self._of(three, 1, linear.pack, _pack),
                look_up=self._of(three, 2, linear.look_up, _look_up),
            )
            patch.setattr(quantized, "_compiled", lambda: operator)
            yield

    def _of(self, source: Path, index: int, real: Any, sized: Callable[[Any], Any]) -> Callable[[Any], None]:
        def call(argument: Any) -> None:
            structure = argument._obj
            recorded = Recorded(index, [bytes(structure)])
            sizes, outputs = sized(structure)
            if "page_table" in sizes:
                sizes["page_table"] = self.sequences * structure.table_width * 4
            holder, at = structure, 0
            if isinstance(structure, quantized.Run):
                holder, at = quantized.Stage.from_address(structure.stages), 1
                recorded.pointers.append((0, quantized.Run.stages.offset, 1))
                recorded.buffers.append(bytes(holder))
                recorded.add(structure, {"given": structure.rows})
            recorded.add(holder, sizes, at)
            recorded.calls_threads(structure)
            real(argument)
            for name in outputs:
                offset = getattr(type(holder), name).offset
                (target,) = (to for buffer, place, to in recorded.pointers if (buffer, place) == (at, offset))
                recorded.outputs[target] = ctypes.string_at(getattr(holder, name), sizes[name])
            self.made[source].append(recorded)

        return call


def write(made: Sequence[Recorded], path: Path) -> None:
    """The file that the driver reads."""
    with path.open("wb") as file:

        def numbers(*values: int) -> None:
            file.write(struct.pack(f"<{len(values)}q", *values))

        numbers(len(made))
        for call in made:
            numbers(call.function, len(call.buffers))
            for buffer in call.buffers:
                numbers(len(buffer))
                file.write(buffer)
            numbers(len(call.pointers))
            for pointer in call.pointers:
                numbers(*pointer)


def read(made: Sequence[Recorded], path: Path) -> list[dict[int, bytes]]:
    """The outputs that the driver wrote, for each call by the buffer's index."""
    content, place, found = path.read_bytes(), 0, []
    for call in made:
        outputs = {}
        for i, buffer in enumerate(call.buffers):
            if i in call.outputs:
                outputs[i] = content[place : place + len(buffer)]
            place += len(buffer)
        found.append(outputs)
    assert place == len(content)
    return found
