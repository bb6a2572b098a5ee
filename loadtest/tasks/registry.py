"""The tasks by name."""

from __future__ import annotations

from dataclasses import dataclass

from loadtest.tasks import common_words, frequent_words, infinite, needles, shared, tracking
from loadtest.tasks.niah import Needles
from loadtest.tasks.request import Make, Request
from loadtest.tasks.types import Count, Sample

RULER = "RULER: Hsieh et al. 2024, section 3"
INFINITE_BENCH = "InfiniteBench: Zhang et al. 2024, section 3"
SCBENCH = "SCBench: Li et al. 2024, section 3"


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of question with a known answer.

    Attributes:
        name: of the task, as its source has it.
        description: a line.
        source: paper and section.
        build: makes the samples of one context.
    """

    name: str
    description: str
    source: str
    build: Make


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "needles",
            "many numbers in prose, a question about each of them",
            f"{RULER}, niah_multikey_1; several questions about one context as in {SCBENCH}",
            needles.needles,
        ),
        Task("niah_single_1", "a number hidden in sentences that repeat", RULER, Needles(haystack="noise")),
        Task("niah_single_2", "a number hidden in prose", RULER, Needles(haystack="prose")),
        Task("niah_single_3", "a UUID hidden in prose", RULER, Needles(haystack="prose", values="uuids")),
        Task(
            "niah_multikey_1",
            "four numbers hidden in prose, one asked",
            RULER,
            Needles(haystack="prose", number=4),
        ),
        Task("niah_multikey_2", "a number among nothing but others", RULER, Needles(haystack="needles")),
        Task(
            "niah_multikey_3",
            "a UUID among nothing but others",
            RULER,
            Needles(haystack="needles", keys="uuids", values="uuids"),
        ),
        Task(
            "niah_multivalue",
            "four numbers of one key in prose, all asked",
            RULER,
            Needles(haystack="prose", per_key=4),
        ),
        Task(
            "niah_multiquery",
            "four numbers in prose, all asked",
            RULER,
            Needles(haystack="prose", number=4, asked=4),
        ),
        Task("vt", "variables that got a value through others", RULER, tracking.vt),
        Task("cwe", "the ten words of a list that are more common than the others", RULER, common_words.cwe),
        Task("fwe", "the three most frequent of invented words", RULER, frequent_words.fwe),
        Task("passkey", "a pass key hidden in sentences that repeat", INFINITE_BENCH, infinite.passkey),
        Task(
            "kv_retrieval", "a UUID's value in a JSON object of pairs", INFINITE_BENCH, infinite.kv_retrieval
        ),
        Task("scbench_kv", "several keys of one JSON object of UUID pairs", SCBENCH, shared.kv),
        Task(
            "scbench_prefix_suffix",
            "several strings of one list by how they begin and end",
            SCBENCH,
            shared.prefix_suffix,
        ),
        Task("scbench_vt", "several chains of variables in one text", SCBENCH, shared.vt),
    )
}
"""All tasks, the quick form's first."""

VERSION = 2
"""Version of the tasks' questions: raised whenever the same arguments of ``make`` give other samples than
before, so that no comparison goes on with other questions under the same keys."""


def make(
    task: str,
    count: Count,
    text: str,
    length: int,
    index: int,
    seed: int,
    turns: int = 1,
    *,
    reserve: int = 0,
) -> list[Sample]:
    """All samples of one context.

    Args:
        task: a name of ``TASKS``.
        count: the model's tokenizer.
        text: running text to hide needles in, like ``loadtest.texts.prose`` gives; unused by tasks without
            prose.
        length: tokens of prompt and answer together, at most; with a sentence or an item more it would be
            too long.
        index: number of the context.
        seed: of all that is drawn; with the same arguments the samples are the same.
        turns: questions to ask about the context. Tasks with fewer ask fewer: most have one question, and
            ``needles`` no more than it has needles.
        reserve: tokens of ``length`` to leave to special tokens and the chat template.

    Returns:
        A sample for each question, by turn.

    Raises:
        ValueError: there is no such task, the length is too short or too long for it, the text is empty, or
            the package that the task draws its words from is missing.
    """
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}; there are {', '.join(TASKS)}")
    if turns < 1:
        raise ValueError(f"a context needs at least 1 question, not {turns}")
    request = Request(task, count, text, length, index, seed, turns, reserve)
    return TASKS[task].build(request)
