"""When an engine counts as hung, by looks at its pulse."""

from server.engine.ipc.pulse import Pulse, Reading
from server.engine.ipc.watch import LOOK_SECONDS, Watch


class Looks:
    """Regular looks of a server at an engine."""

    def __init__(self, pulse, limit):
        self.watch = Watch(pulse, limit)
        self.now = 1000.0

    def after(self, seconds, sent=0):
        """Looks until so much time has passed; what was found, if anything was."""
        end = self.now + seconds
        while self.now < end:
            self.now += LOOK_SECONDS
            if (found := self.watch.look(self.now, sent)) is not None:
                return found
        return None


def test_both_processes_see_the_same(memory, pulse):
    other = Pulse(memory)
    assert other.read() == Reading(0, 0, False)
    pulse.begin()
    pulse.handle()
    pulse.compile(True)
    began, handled, compiling = other.read()
    assert began > 0
    assert (handled, compiling) == (1, True)
    pulse.compile(False)
    pulse.rest()
    assert other.read() == Reading(0, 1, False)


def test_an_engine_without_work_may_rest(pulse):
    looks = Looks(pulse, 10)
    pulse.handle()
    assert looks.after(1000, sent=1) is None
    assert looks.watch.age == 0


def test_a_step_that_does_not_end_is_found(pulse):
    looks = Looks(pulse, 10)
    pulse.begin()
    assert looks.after(9) is None
    assert 8 <= looks.watch.age <= 9
    # One interval for the first look, which has nothing to compare with, and one for the last.
    assert looks.after(1 + 2 * LOOK_SECONDS) == f"has been in one step for {looks.watch.age:.1f} s"


def test_steps_that_go_on_are_not(pulse):
    looks = Looks(pulse, 10)
    for _ in range(50):
        pulse.begin()
        assert looks.after(9) is None
    pulse.rest()
    assert looks.after(LOOK_SECONDS) is None
    assert looks.watch.age == 0


def test_a_message_that_is_not_read_is_found(pulse):
    looks = Looks(pulse, 10)
    assert looks.after(100) is None
    assert looks.after(9, sent=1) is None
    assert "has not read its messages" in looks.after(2, sent=1)


def test_compiling_a_kernel_may_take_five_times_as_long(pulse):
    looks = Looks(pulse, 10)
    pulse.begin()
    assert looks.after(9) is None
    pulse.compile(True)
    assert looks.after(49) is None
    assert "has been compiling a kernel" in looks.after(2)
    pulse.compile(False)
    assert looks.after(9) is None, "the step has its whole time again"


def test_a_pause_of_the_server_is_not_held_against_the_engine(pulse):
    looks = Looks(pulse, 10)
    pulse.begin()
    assert looks.after(5) is None
    looks.now += 3600
    assert looks.after(LOOK_SECONDS) is None
    assert looks.watch.age <= 5 + 2 * LOOK_SECONDS
    assert looks.after(10) is not None, "it is found all the same if it does not go on"


def test_without_a_limit_nothing_is_found_and_the_age_is_told(pulse):
    looks = Looks(pulse, 0)
    pulse.begin()
    assert looks.after(1000) is None
    assert looks.watch.age > 990
