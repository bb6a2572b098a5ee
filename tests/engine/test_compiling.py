"""What the engine tells of kernels that are compiled; ``compiling_compiled.py`` compiles some."""

import sys

from server.engine import compiling


def test_without_triton_nothing_is_asked(monkeypatch):
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    compiling.tell_of_compiling(lambda under_way: None)
    assert "triton" not in sys.modules, "its import takes a second"
