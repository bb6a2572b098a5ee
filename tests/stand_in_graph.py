"""A graph that stands for one of CUDA's, to see on any machine what would go wrong with captured steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from tests.stand_in_device import INDEXED

Call = Callable[[], None]

_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class StandInGraph:
    """Notes the operators and programs that a computation launches; a replay runs these and nothing else.

    As with a graph of CUDA, what Python decided stays decided: numbers that were given to operators as such,
    shapes, grids, which operators. Tensors keep their memory, and a replay finds there what lies there now.
    What would make the host read the device, or give it numbers, raises.

    Attributes:
        calls: of operators and programs, in order.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def capture(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """See ``server.models.executors.graph.CudaGraph.capture``."""
        with _Operators(self.calls), pytest.MonkeyPatch.context() as patch:
            run = InterpretedFunction.run

            def launch(program: Any, *args: Any, **kwargs: Any) -> None:
                def again() -> None:
                    with _disable_current_modes():  # what the interpreter itself asks of torch
                        run(program, *args, **kwargs)

                self.calls.append(again)
                again()

            patch.setattr(InterpretedFunction, "run", launch)
            return compute()

    def replay(self) -> None:
        """See ``server.models.executors.graph.CudaGraph.replay``."""
        for call in self.calls:
            call()


class _Operators(TorchDispatchMode):
    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in INDEXED:
            waits = any(_is_tensor(index) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        else:
            waits = bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))
        if waits:
            raise RuntimeError(f"{func} makes the host wait for the device")
        result = func(*args, **kwargs)
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        made = [leaf for leaf in tree_leaves(result) if _is_tensor(leaf)]
        fresh = [tensor.untyped_storage()._cdata not in given for tensor in made]
        changes = any(each.alias_info and each.alias_info.is_write for each in func._schema.arguments)
        empty = func._schema.name.split("::")[1] in _EMPTY
        if empty or not (changes or any(fresh)):
            return result  # nothing is computed: a view stays one, and memory is had already

        def again() -> None:
            for tensor, own, new in zip(made, fresh, tree_leaves(func(*args, **kwargs)), strict=True):
                if own:
                    tensor.copy_(new)

        self._calls.append(again)
        return result


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
