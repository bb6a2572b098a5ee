"""When an engine that failed is started again."""

from server.engine.restarts import Restarts


def test_waits_double_up_to_a_minute_and_end():
    restarts = Restarts(9, 600, 1.0)
    waits = [restarts.failed(float(n)) for n in range(10)]
    assert waits == [0, 1, 2, 4, 8, 16, 32, 60, 60, None]
    assert restarts.words == "10 times within 600 s of serving"


def test_failures_outside_of_the_window_are_forgotten():
    restarts = Restarts(2, 100, 1.0)
    assert [restarts.failed(now) for now in (0, 10, 105, 111, 300)] == [0, 1, 1, 1, 0]
    assert restarts.failed(301) == 1
    assert restarts.failed(302) is None


def test_with_a_limit_of_0_there_is_no_restart():
    restarts = Restarts(0, 100, 1.0)
    assert restarts.failed(0) is None
    assert restarts.words == "1 time within 100 s of serving"


def test_many_failures_without_a_limit_to_speak_of():
    restarts = Restarts(10**6, 1e9, 0.5)
    assert [restarts.failed(0.0) for _ in range(2000)][-1] == 60


def test_failures_without_serving_between_them_are_never_forgotten():
    restarts = Restarts(5, 600, 1.0)
    assert None not in [restarts.failed(3600.0) for _ in range(5)]
    assert restarts.failed(3600.0) is None
