"""The pace of prompts beside decodes whose number has changed."""

import pytest

from server.engine.pace import Pace, Work

TARGET = 0.04
PER_TOKEN = 4e-4

# Seconds of the default model's decode steps, measured.
DECODES = {1: 0.0030, 8: 0.0069, 32: 0.021}


@pytest.mark.parametrize("known", DECODES)
@pytest.mark.parametrize("decodes", DECODES)
def test_prompts_keep_their_time_whatever_number_of_decodes_the_last_step_without_them_had(known, decodes):
    """A decode's share of that step, times their number now, would take up to seven times what they take."""
    pace = Pace(TARGET, reach=1e9)
    pace.observe(Work(0, 0), known, DECODES[known])
    for _ in range(20):
        tokens = pace.tokens(0, pace.allowance)
        pace.observe(Work.of([(0, tokens)]), decodes, tokens * PER_TOKEN + DECODES[decodes])
    assert tokens * PER_TOKEN == pytest.approx(TARGET, rel=0.2)
