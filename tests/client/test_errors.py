from __future__ import annotations

import grpc
import pytest

from longspan import (
    Client,
    InternalError,
    InvalidRequestError,
    LongspanError,
    NotFoundError,
    UnavailableError,
    Violation,
)


def test_violations(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="the request has 2 mistakes") as raised:
        client.generate("!invalid")
    error = raised.value
    assert isinstance(error, ValueError)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.violations == (Violation("sampling.top_p", "is above 1"), Violation("n", "is 0"))
    assert error.retry_after is None
    assert [str(violation) for violation in error.violations] == ["sampling.top_p: is above 1", "n: is 0"]


def test_what_was_not_found(client: Client) -> None:
    with pytest.raises(NotFoundError) as raised:
        client.generate("!unknown")
    assert raised.value.resource == "gpt-9"


def test_details_that_contradict_the_status_are_left_out(client: Client) -> None:
    with pytest.raises(InternalError, match="oops") as raised:
        client.generate("!contradiction")
    assert raised.value.violations == ()


def test_a_status_without_details(client: Client) -> None:
    with pytest.raises(InternalError, match="request r1"):
        client.generate("!bug")


def test_a_status_without_a_class_of_its_own(client: Client) -> None:
    with pytest.raises(LongspanError, match="lost") as raised:
        client.generate("!data")
    assert type(raised.value) is LongspanError
    assert raised.value.code is grpc.StatusCode.DATA_LOSS


def test_nobody_answers() -> None:
    with (
        Client(host="::1", port=1) as client,
        pytest.raises(UnavailableError, match=r"at \[::1\]:1 .*longspan serve"),
    ):
        client.generate("hi", timeout=5)
