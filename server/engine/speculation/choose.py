"""Which drafter a deployment has, and what does not go with any."""

from __future__ import annotations

from attention.backends import UnsupportedError, make_pattern, resolve
from attention.patterns.base import ContentPattern, Pattern
from server.engine.runner import Runner
from server.engine.speculation.draft_model import DraftModel
from server.engine.speculation.drafter import Drafter
from server.engine.speculation.ngram import NgramDrafter
from server.engine.speculation.other import ModelDrafter
from server.engine.speculation.own import SelfDrafter
from server.errors import RefusedError
from server.messages import Speculation
from server.models.executors.choose import choose_executor
from server.models.loaded import LoadedModel
from server.settings import DRAFT_ATTENTION, Settings

_DRAFT_TOKENS = {"ngram": 8, "self": 4, "draft": 4}


def refuse_speculation(settings: Settings, device: str) -> None:
    """Refuses settings that do not go with speculation, before a model is loaded.

    Args:
        settings: of the server.
        device: ``cpu`` or ``cuda``.

    Raises:
        RefusedError: the sentence says why.
    """
    if settings.speculate == "off":
        return
    asked = f"--speculate {settings.speculate}"
    if device != "cpu":
        raise RefusedError(
            f"{asked}: on a GPU a step is launched before the tokens of the one before it are known, so that "
            "none can be drafted after them; use --device cpu or leave it out"
        )
    pattern = _pattern(settings.attention, settings.attention_option)
    if isinstance(pattern, ContentPattern):
        raise RefusedError(
            f"{asked}: pattern {pattern.name} selects by keys, and those of rejected tokens would stay in "
            "what it selects by; choose a pattern by positions, like --attention full, or leave it out"
        )
    if settings.speculate == "ngram":
        return
    if settings.speculate == "draft" and settings.draft_model is None:
        raise RefusedError(f"{asked}: --draft-model must name the model that drafts")
    if not pattern.dense:
        raise RefusedError(
            f"{asked}: drafts are made from the pages of all tokens, and pattern {pattern.name} does not see "
            "all; use --attention full, or --speculate ngram"
        )
    if settings.speculate == "draft":
        return
    drafting = _pattern(settings.draft_attention or DRAFT_ATTENTION, settings.draft_attention_option)
    if isinstance(drafting, ContentPattern) or drafting.dense:
        what = "sees all, and saves nothing" if drafting.dense else "needs data of its own in the KV cache"
        raise RefusedError(
            f"--draft-attention {settings.draft_attention}: pattern {drafting.name} {what}; choose one that "
            f"selects by positions, like --draft-attention {DRAFT_ATTENTION}"
        )


def possible_speculation(settings: Settings, device: str) -> list[str]:
    """The values of ``--speculate`` that go with the other settings; ``draft`` needs a draft model besides.

    Args:
        settings: of the server.
        device: ``cpu`` or ``cuda``.
    """
    found = []
    for kind in ("ngram", "self", "draft"):
        asked = settings.model_copy(
            update={"speculate": kind, "draft_model": settings.draft_model or "a draft model"}
        )
        try:
            refuse_speculation(asked, device)
        except RefusedError:
            continue
        found.append(kind)
    return found


def make_drafter(
    settings: Settings,
    runner: Runner,
    loaded: LoadedModel,
    context_length: int,
    draft: DraftModel | None,
    budget: int,
) -> Drafter | None:
    """The drafter; ``None`` where there is none.

    Args:
        settings: of the server, such that ``refuse_speculation`` does not refuse them.
        runner: that verifies.
        loaded: its model.
        context_length: most tokens of a sequence.
        draft: the model that drafts for it, if one does.
        budget: tokens of a step, at most.

    Raises:
        RefusedError: no kernel computes the attention that is to draft.
    """
    if settings.speculate == "off":
        return None
    of_all = (draft_tokens(settings), context_length, runner.rope)
    if draft is not None:
        context = min(context_length, draft.prepared.loaded.context_length)
        executor = draft.executor(runner.cache.pages)
        return ModelDrafter(executor, draft_tokens(settings), context, runner.rope, budget)
    if settings.speculate == "ngram":
        return NgramDrafter(*of_all)
    cache = runner.cache
    backend, options = settings.draft_attention or DRAFT_ATTENTION, settings.draft_attention_option
    place = (loaded.layers, runner.device, cache.dtype, cache.page_size)
    try:
        attention = resolve(backend, options, settings.kernel, *place)
        return SelfDrafter(choose_executor(loaded, attention, cache), *of_all)
    except UnsupportedError as error:
        raise RefusedError(f"--draft-attention: {error}") from error


def draft_tokens(settings: Settings) -> int:
    """The most tokens that are drafted for a sequence in a step."""
    return settings.draft_tokens or _DRAFT_TOKENS[settings.speculate]


def told(settings: Settings, drafter: Drafter | None, draft: DraftModel | None) -> Speculation | None:
    """The drafter as ``GetModelInfo`` tells it."""
    if drafter is None:
        return None
    attention = drafter.attention if isinstance(drafter, SelfDrafter) else None
    return Speculation(
        settings.speculate,
        draft_tokens(settings),
        "" if attention is None else attention.backend,
        {} if attention is None else dict(attention.options),
        "" if draft is None else draft.source,
    )


def _pattern(backend: str, options: dict[str, str]) -> Pattern:
    try:
        return make_pattern(backend, options)
    except UnsupportedError as error:
        raise RefusedError(str(error)) from error
