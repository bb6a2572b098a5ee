"""A device that stands for a GPU, to see on any machine what would make the host wait for one."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any, Self
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from attention import transfer

_ROOT = Path(__file__).resolve().parents[1]
_SOURCES = ("attention", "server")

# Who asks it is of interest.
_TRANSFER = Path("attention", "transfer.py")

# What torch has of its own for each kind of device stays one operator, as a GPU's would.
_WHOLE = {"scaled_dot_product_attention", "linear", "matmul", "rms_norm", "pin_memory"}

# What torch's tags call of dynamic shape always, and is so with masks only.
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


# What a copy holds until it is there, in each byte.
_GARBAGE = 0xA5


class _OnDevice(torch.Tensor):
    """Says that it is on the device; its numbers are ``held``, on the CPU."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> _OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=StandInDevice.device,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} was given a tensor of a stand-in device outside its context")


class _Functions(TorchFunctionMode):
    """Lets functions that know ``meta`` or classes of tensors go the way that they go for a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _is_stand_in(kwargs.get("device")):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is torch.Tensor.tolist:
            return func(args[0].cpu())
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], tree_map(_listed, args[1], is_leaf=_is_list), *args[2:])
        return func(*args, **kwargs)


class StandInDevice:
    """While entered, tensors for torch's device ``meta`` hold numbers, and waits for them are noted.

    The numbers lie and are computed on the CPU. As with a GPU, what is there and what is not do not mix (but
    for single numbers and indices), and nothing there can be had as an array.

    A wait is noted where torch itself says that what an operator returns, or its shape, depends on numbers
    that the operator is given (its tags; indexing by masks, which has none, is known here), and where tensors
    are copied between the device and the host. Copies to the device from pinned memory with ``non_blocking``
    are no waits, nor are copies to the host with ``non_blocking``: these hold something else until a
    torch event that was recorded after them is waited for, which is noted. ``x[mask] = number`` counts as
    one, though CUDA has a way around it.

    It can't see what a GPU's operators do inside, where they have other implementations: allocate memory,
    launch several kernels, wait. Nor can it see what goes past torch's dispatcher: ``data_ptr``, Triton, C++.
    Code that asks for a device named ``cuda`` goes another way here.

    Attributes:
        device: where tensors must be asked for.
        reads: where in the project the host reads what the device computed, and how often.
        copies: where the host gives numbers to the device in a way that waits for it, and how often.
        sent: where it gives them in a way that does not.
    """

    device = torch.device("meta")

    def __init__(self) -> None:
        self.reads: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.coming: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._modes = ExitStack()

    def forget(self) -> None:
        """Begins anew with the notes."""
        for notes in self.reads, self.copies, self.sent:
            notes.clear()

    def __enter__(self) -> Self:
        self._modes.enter_context(mock.patch.object(transfer, "Event", partial(_Event, self)))
        self._modes.enter_context(torch.inference_mode())
        self._modes.enter_context(_Functions())
        self._modes.enter_context(_Watch(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._modes.close()


class _Event:
    """What stands for ``torch.Event``."""

    def __init__(self, notes: StandInDevice, device: torch.device) -> None:
        assert _is_stand_in(device)
        self._notes = notes
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(self) -> None:
        self._before, self._notes.coming = self._notes.coming, []

    def synchronize(self) -> None:
        self._notes.reads[_where()] += 1
        for copy, numbers in self._before:
            copy.copy_(numbers)


class _Watch(TorchDispatchMode):
    """Computes on the CPU and takes notes."""

    def __init__(self, notes: StandInDevice) -> None:
        super().__init__()
        self._notes = notes
        self._pinned: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        if _is_composite(func):
            with torch._C.DisableTorchFunction(), self:
                return func.decompose(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        wrapped = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, _OnDevice)}
        if name in ("aten::pin_memory", "aten::_pin_memory"):
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        self._note(func, args, kwargs, leaves)
        there = bool(wrapped)
        if kwargs.get("device") is not None:
            there = _is_stand_in(kwargs["device"])
            kwargs["device"] = torch.device("cpu")
        elif name == "aten::copy_":
            there = isinstance(args[0], _OnDevice)
        if kwargs.get("pin_memory"):
            raise NotImplementedError("the stand-in device pins by pin_memory() only")
        result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if wrapped and not there and name == "aten::_to_copy" and kwargs.get("non_blocking"):
            self._notes.coming.append((result, result.clone()))
            result.untyped_storage().fill_(_GARBAGE)

        def wrap(found: Any) -> Any:
            if not isinstance(found, torch.Tensor) or not there:
                return found
            known = wrapped.get(id(found))
            if known is None:
                return _OnDevice(found)
            assert known.shape == found.shape, f"{func} changes a shape in place"
            return known

        return tree_map(wrap, result)

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], leaves: list[Any]) -> None:
        """Notes what this call would wait for, and refuses what a GPU would."""
        name = func._schema.name
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, _OnDevice)]
        lost = [tensor for tensor in tensors if tensor.is_meta and not isinstance(tensor, _OnDevice)]
        assert not lost, f"{func} was given a tensor of torch's own device meta, without numbers"
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[1] if name == "aten::copy_" else args[0]
            to = args[0].device if name == "aten::copy_" else kwargs.get("device") or source.device
            if isinstance(source, _OnDevice) and not _is_stand_in(to):
                if name == "aten::copy_" or not kwargs.get("non_blocking"):
                    self._notes.reads[_where()] += 1
            elif not isinstance(source, _OnDevice) and _is_stand_in(to):
                pinned = any(source is each for each in self._pinned) and (
                    kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:] == (True,))
                )
                (self._notes.sent if pinned else self._notes.copies)[_where()] += 1
            return
        if not there:
            return
        if name in INDEXED:
            for index in args[1]:
                if isinstance(index, _OnDevice) and index.dtype in (torch.bool, torch.uint8):
                    self._notes.reads[_where()] += 1
                elif isinstance(index, torch.Tensor) and not isinstance(index, _OnDevice):
                    self._notes.copies[_where()] += 1
            tensors = [tensor for tensor in tensors if not any(tensor is index for index in args[1])]
        elif torch.Tag.data_dependent_output in func.tags or (
            torch.Tag.dynamic_output_shape in func.tags and kwargs.get("output_size") is None
        ):
            self._notes.reads[_where()] += 1
        if any(not isinstance(tensor, _OnDevice) and tensor.dim() for tensor in tensors):
            raise RuntimeError(f"{func} was given tensors of the device and others")


@cache
def _is_composite(func: Any) -> bool:
    """Whether torch makes an operator of others, the same for all devices."""
    name = func.name()
    return name.removeprefix("aten::").split(".")[0] not in _WHOLE and bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _listed(value: Any) -> Any:
    return torch.tensor(value) if isinstance(value, list) else value


def _held(value: Any) -> Any:
    return value.held if isinstance(value, _OnDevice) else value


def _is_stand_in(device: Any) -> bool:
    return device is not None and torch.device(device) == StandInDevice.device


def _where() -> str:
    """The function of the project that is running, as ``folder/file.py:name``."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_ROOT):
            place = path.relative_to(_ROOT)
            if place.parts[0] in _SOURCES and place != _TRANSFER:
                return f"{place}:{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "outside"
