"""Facts that only a server of the model knows, asked before anything is measured: refusals come at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from loadtest.compare.estimate import Needs, needs, probe
from loadtest.compare.evaluator import FIRST_RATE, Evaluator
from loadtest.compare.plan import Material, PlanError, Tell
from loadtest.compare.types import Comparison, Plan
from loadtest.deployment import Deployment
from loadtest.evaluation.prompts import prompt
from loadtest.measuring.generates import require_generation
from loadtest.measuring.servers import OpenError, groups, most_at_once, open_all
from loadtest.measuring.types import length_label
from longspan import Client, LongspanError

_MOST_SERVERS = 64
"""At once, however much memory there is."""

_SPARE = 4
"""Times the longest load that a server's KV cache holds, so that prompts stay in its prefix cache."""


@dataclass(frozen=True, slots=True)
class Found:
    """Facts from full attention's server.

    Attributes:
        plan: completed with ``chat`` and ``kv_memory``.
        model: for ``Comparison.model``.
        versions: for ``Comparison.versions``.
        kv_each: bytes of KV cache for each server that measures; ``None`` where the operator's arguments say.
        at_once: servers that this machine's memory holds.
        needs: seconds that parts of the comparison take.
        rate: tokens per second of one candidate that quality can be expected to take.
    """

    plan: Plan
    model: dict[str, Any]
    versions: dict[str, str]
    kv_each: int | None
    at_once: int
    needs: Needs
    rate: float = FIRST_RATE


def look(plan: Plan, material: Material, tell: Tell) -> Found:
    """Serves full attention once, and refuses what can't be measured on it.

    Raises:
        PlanError: the model can't be served, or lengths, text, tasks or questions don't fit it.
    """
    full = plan.candidates[0]
    tell(f"starting {full.name}: does the plan fit the model?")
    began = time.monotonic()
    try:
        with open_all([full], plan.arguments) as targets:
            target = targets[full.name]
            with Client(target.host, target.port) as client:
                return _look(plan, material, client, target.pids[0], time.monotonic() - began)
    except OpenError as error:
        raise PlanError(str(error)) from error
    except LongspanError as error:
        raise PlanError(f"full attention can't be asked: {error}") from error


def _look(plan: Plan, material: Material, client: Client, pid: int, start: float) -> Found:
    model, info = client.model_info(), client.server_info()
    require_generation(client, model)
    plan = _divided(plan, model.name, model.context_length)
    longest = plan.contexts[-1]
    if material.chat and not model.has_chat_template:
        raise PlanError(f"{model.name} has no chat template; leave out --chat")
    chat = model.has_chat_template if material.chat is None else material.chat
    plan = replace(plan, chat=chat, kv_memory=info.load.kv_bytes)
    page_bytes = info.load.kv_bytes / (info.load.pages_total + 1)
    token_bytes = page_bytes / info.load.page_size
    users = max(load.users for load in plan.loads)
    # A document's passages stay in the prefix cache for its next question, whatever the model's context.
    need = int(_SPARE * (users + 1) * max(longest, *plan.beyond, 0) * token_bytes)
    chosen = any(word.startswith("--kv-memory") for word in plan.arguments)  # or its share
    kv_each = None if chosen else min(info.load.kv_bytes, need)
    pace = probe(client, plan.contexts, model.vocabulary_size, start)
    # Sizes every task and cuts the text at every length: what is too short is told here.
    try:
        evaluator = Evaluator(
            Comparison(plan, "", {}),
            client,
            text=material.text,
            prose=material.prose,
            own=material.own,
            rate=pace.rate(longest),
        )
    except ValueError as error:
        raise PlanError(str(error)) from error
    for sample in material.own:
        count = len(prompt(client, sample, chat=chat).ids) + sample.max_new_tokens
        if count > model.context_length:
            raise PlanError(
                f"question {sample.turn + 1} about context {sample.index + 1} of {plan.own} takes {count} "
                f"tokens with its answer, but {model.name} has a context of {model.context_length}"
            )
    # Not only as many as this plan has: what it goes on with may have others.
    at_once = most_at_once(pid, kv_each or info.load.kv_bytes, _MOST_SERVERS)
    return Found(
        plan,
        {
            "name": model.name,
            "architecture": model.architecture,
            "parameters": model.parameters,
            "dtype": model.dtype,
            "kv_dtype": model.kv_dtype,
            "device": info.device,
            "context_length": model.context_length,
            "vocabulary_size": model.vocabulary_size,
        },
        {"longspan": info.version, **info.versions},
        kv_each,
        at_once,
        needs(plan, pace, evaluator, groups(plan.served, max(2, at_once))),
        # A probe on a busy machine is slow, and a unit that seems too expensive is never measured.
        max(FIRST_RATE, pace.rate(longest)),
    )


def _divided(plan: Plan, model: str, context_length: int) -> Plan:
    """The plan with its contexts divided into those that the model holds and those beyond.

    Raises:
        PlanError: some are beyond, and no reading is a candidate; or all are, and there is no measure.
    """
    fitting = tuple(length for length in plan.contexts if length <= context_length)
    beyond = plan.contexts[len(fitting) :]
    longest = plan.contexts[-1]
    if beyond and not plan.readings:
        raise PlanError(
            f"{model} is served with a context of {context_length} tokens, and {longest} can't be measured; "
            "leave out the longer --context, stretch the model's by --rope-scaling after --, or add a "
            "reading, like --candidate extractive"
        )
    if not fitting:
        raise PlanError(
            f"{model} is served with a context of {context_length} tokens; give a --context that it holds "
            "too, at which readings are held against full attention"
        )
    loads = tuple(load for load in plan.loads if load.context in fitting)
    return replace(plan, contexts=fitting, beyond=beyond, loads=loads)


def try_all(
    parts: Sequence[Sequence[Deployment]], arguments: Sequence[str], kv_each: int | None, tell: Tell
) -> None:
    """Starts each group of servers and ends it, where memory does not hold all at once.

    So what can't be served is refused before hours were spent on the groups before it.

    Raises:
        PlanError: some did not start; names all of them.
    """
    reasons: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        tell(f"memory holds {len(part)} servers at a time: trying group {number} of {len(parts)}")
        try:
            with open_all(part, arguments, kv_each):
                pass
        except OpenError as error:
            reasons |= error.reasons
    if reasons:
        raise PlanError(str(OpenError(reasons)))


def describe(plan: Plan) -> str:
    """The plan in a line."""
    lengths = ", ".join(length_label(context) for context in (*plan.contexts, *plan.beyond))
    return f"{len(plan.candidates)} variants at {lengths}; tasks: {', '.join(plan.tasks)}; text: {plan.text}"
