"""Vectors of all tokens are bounded for a request and for all in flight."""

import grpc
import pytest

from server.api.errors import ServiceError
from server.api.vector_bytes import VectorBytes

MIB = 1 << 20


def test_all_requests_together_have_a_bound():
    held = VectorBytes(40 * MIB)
    with held.hold(16 * MIB), held.hold(0), held.hold(16 * MIB):
        with pytest.raises(ServiceError) as caught, held.hold(8 * MIB + 1):
            pass
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.reason == "VECTOR_BYTES"
        assert f"wait for {32 * MIB} bytes" in caught.value.message
        assert f"this one asks for {8 * MIB + 1}, and {40 * MIB} are the most" in caught.value.message
        with held.hold(8 * MIB):
            pass
    with pytest.raises(RuntimeError), held.hold(16 * MIB):
        raise RuntimeError
    with held.hold(16 * MIB), held.hold(16 * MIB), held.hold(8 * MIB):
        pass


def test_one_request_has_a_bound():
    with pytest.raises(ServiceError) as caught, VectorBytes().hold(16 * MIB + 1):
        pass
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert f"asks for {16 * MIB + 1} bytes of vectors; at most {16 * MIB} are sent" in caught.value.message
    assert "fewer or shorter texts" in caught.value.message, "a long text alone can be too much"
