"""From the user's workload options to a function that draws the sessions of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loadtest.load.sharegpt_file import Conversations
from loadtest.load.targets import Endpoint
from loadtest.load.tokens import counter
from loadtest.load.types import Session, Wanted
from loadtest.load.workloads import WORKLOADS, Shape, WorkloadError, from_file
from loadtest.measuring.generates import require_generation
from longspan import Client

Draw = Callable[[int, int], list[Session]]
"""Draws a number of sessions from a seed."""

_CONVERSATIONS = "multi-turn"
_SHARING = frozenset({"shared-prefix", _CONVERSATIONS})
_TOKENS = 128
_TURNS = 4


@dataclass(frozen=True, slots=True)
class Known:
    """Facts about the models that are measured.

    Attributes:
        vocabulary: token ids that all of them have are below this; 0 if it is not known.
        context: most tokens of prompt and output that all of them take; 0 if it is not known.
        count: tokens of a text; ``None`` if nothing can count them.
    """

    vocabulary: int = 0
    context: int = 0
    count: Callable[[str], int] | None = None


def known(client: Client | None, endpoint: Endpoint | None, told: Known | None = None) -> Known:
    """The facts that hold for both targets.

    Args:
        client: of Longspan's server; ``None`` if it is not measured. It must stay open while sessions are
            drawn.
        endpoint: the other target.
        told: by the endpoint.

    Raises:
        longspan.LongspanError: the server does not answer, or its model does not generate.
        EndpointError: the endpoint's tokenizer can't be read.
    """
    told = told or Known()
    vocabularies, contexts, count = [told.vocabulary], [told.context], None
    if endpoint is not None and endpoint.tokenizer is not None:
        tokens = counter(endpoint.tokenizer)
        vocabularies.append(tokens.vocabulary)
        count = tokens.count
    if client is not None:
        model = client.model_info()
        require_generation(client, model)
        vocabularies.append(model.vocabulary_size)
        contexts.append(model.context_length)
        count = partial(_count, client)
    return Known(
        min((each for each in vocabularies if each), default=0),
        min((each for each in contexts if each), default=0),
        count,
    )


def _count(client: Client, text: str) -> int:
    return len(client.tokenize(text, special_tokens=False).token_ids)


def drawing(wanted: Wanted, models: Known) -> tuple[dict[str, str | int], Draw]:
    """The workload's description for documents, and what draws it.

    Raises:
        WorkloadError: it can't be made; says what to change.
    """
    file = Path(wanted.name)
    if wanted.name in WORKLOADS:
        made = _synthetic(wanted, models)
    elif file.suffix == ".json":
        made = _sharegpt(wanted, models)
    elif file.suffix == ".jsonl":
        shape = _shape(wanted, models)
        made = {"name": wanted.name}, lambda sessions, seed: from_file(file, shape(sessions, seed))
    else:
        raise WorkloadError(
            f"there is no workload {wanted.name!r}; choose {', '.join(WORKLOADS)}, or a file: .jsonl of "
            "prompts, or .json in ShareGPT's format"
        )
    made[1](1, 0)
    return made


def _shape(wanted: Wanted, models: Known) -> Callable[[int, int], Shape]:
    return lambda sessions, seed: Shape(
        sessions=sessions,
        prompt_tokens=wanted.prompt_tokens or _TOKENS,
        output_tokens=wanted.output_tokens or _TOKENS,
        vocabulary=models.vocabulary,
        context=models.context or 1 << 30,
        seed=seed,
        groups=wanted.groups,
        prefix_tokens=wanted.prefix_tokens,
        turns=wanted.turns or _TURNS,
    )


def _synthetic(wanted: Wanted, models: Known) -> tuple[dict[str, str | int], Draw]:
    name = wanted.name
    if not models.vocabulary and name != _CONVERSATIONS:
        raise WorkloadError(
            f"the workload {name} draws token ids, and the size of the endpoint's vocabulary is not known; "
            "give its --tokenizer, or --workload multi-turn or a file"
        )
    described: dict[str, str | int] = {
        "name": name,
        "prompt_tokens": wanted.prompt_tokens or _TOKENS,
        "output_tokens": wanted.output_tokens or _TOKENS,
        "fresh": name not in _SHARING,
    }
    if name == "shared-prefix":
        described |= {"groups": wanted.groups, "prefix_tokens": wanted.prefix_tokens}
    if name == _CONVERSATIONS:
        described["turns"] = wanted.turns or _TURNS
    shape = _shape(wanted, models)
    return described, lambda sessions, seed: WORKLOADS[name](shape(sessions, seed))


def _sharegpt(wanted: Wanted, models: Known) -> tuple[dict[str, str | int], Draw]:
    if models.count is None:
        raise WorkloadError("the lengths of a ShareGPT file are counted with --tokenizer; give the model's")
    count = models.count
    conversations = Conversations(Path(wanted.name))
    context = models.context or 1 << 30
    described: dict[str, str | int] = {
        "name": wanted.name,
        "conversations": len(conversations),
        "most_prompt_tokens": wanted.most_prompt_tokens,
        "most_total_tokens": wanted.most_total_tokens,
        "turns": wanted.turns or 1,
    }
    if wanted.output_tokens:
        described["output"] = wanted.output_tokens
    return described, lambda sessions, seed: conversations.draw(sessions, seed, wanted, count, context)
