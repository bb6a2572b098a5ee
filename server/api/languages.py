"""What a request to an encoder-decoder says beside its prompt: of which language that and the output are."""

from __future__ import annotations

import re
from dataclasses import replace

from longspan.v1 import inference_pb2
from server.api import errors
from server.api.checks import Violations, refuse
from server.api.errors import Violation, quote
from server.api.state import Served
from server.models.target import Target

# How tokenizers spell tokens for languages: en_XX and eng_Latn, and __en__ of M2M100.
_LANGUAGE = re.compile(r"__[a-z]{2,3}__|[a-z]{2,3}_[A-Z][A-Za-z]{1,3}")
# Of Blenderbot, which has no languages.
_OTHERS = frozenset({"__end__", "__unk__"})
_TOLD = 8


def encoder_decoder_info(served: Served) -> inference_pb2.EncoderDecoderInfo | None:
    """What ``GetModelInfo`` tells of an encoder-decoder; ``None`` of others."""
    target = served.generation.target
    if target is None:
        return None
    return inference_pb2.EncoderDecoderInfo(
        source_length=target.info.source_length,
        target_length=target.info.target_length,
        start_token_ids=target.start,
        languages=sorted(_languages(served)),
    )


def target_of(request: inference_pb2.GenerateRequest, served: Served) -> tuple[Target | None, list[int]]:
    """An encoder-decoder's target as the request wants it, and the tokens that its output begins with.

    Raises:
        ServiceError: the fields at fault.
    """
    target = served.generation.target
    refuse(_faults(request, served, target))
    if target is None:
        return None, []
    first = [] if target.forced_first is None else [target.forced_first]
    if request.target_language:
        token = _token("target_language", request.target_language, served)
        # mBART's decoder begins with the language; others begin as always, and output it first.
        if set(target.start) & set(_languages(served).values()):
            target = replace(target, start=[token])
        else:
            first = [token]
    forced, stop = len(first) + len(request.forced_token_ids), request.stop
    most = target.info.target_length - len(target.start)
    most = min(most, stop.max_tokens) if stop.HasField("max_tokens") else most
    if request.forced_token_ids and forced > most:
        sentence = f"makes {forced} forced tokens of the output, which has room for {most}"
        raise errors.invalid([Violation("forced_token_ids", sentence)])
    return target, first


def in_language(request: inference_pb2.GenerateRequest, ids: list[int], served: Served) -> list[int]:
    """A prompt's tokens with that of its language, which the tokenizer puts at the beginning or the end.

    Raises:
        ServiceError: the model has no such language, or its prompts have none.
    """
    if not request.source_language:
        return ids
    token = _token("source_language", request.source_language, served)
    languages = set(_languages(served).values())
    for place in (0, -1):
        if ids[place] in languages:
            ids[place] = token
            return ids
    sentence = "can't be said: the tokenizer puts no token of a language to a prompt; leave it out"
    raise errors.invalid([Violation("source_language", sentence)])


def _faults(request: inference_pb2.GenerateRequest, served: Served, target: Target | None) -> Violations:
    if target is None:
        for name in ("source_language", "target_language"):
            if getattr(request, name):
                yield Violation(name, f"is for encoder-decoders, and {served.name} is none; leave it out")
        return
    if request.logprobs.HasField("prompt"):
        yield Violation("logprobs.prompt", "an encoder-decoder predicts no token of its source; leave it out")
    if request.source_language and request.WhichOneof("prompt") == "token_ids":
        yield Violation("source_language", "is for text; token ids are taken as they are")


def _languages(served: Served) -> dict[str, int]:
    tokens = served.tokenizer.special_tokens
    return {
        name: token
        for name, token in tokens.items()
        if _LANGUAGE.fullmatch(name) and name not in _OTHERS and token < served.ready.vocabulary_size
    }


def _token(field: str, language: str, served: Served) -> int:
    languages = _languages(served)
    for spelled in (language, f"__{language}__"):
        if spelled in languages:
            return languages[spelled]
    known = sorted(languages)
    told = f"it has {', '.join(known[:_TOLD])}{' and others' if len(known) > _TOLD else ''}"
    sentence = (
        f"is {quote(language)}, for which the model has no token; {told if known else 'it has none for any'}"
    )
    raise errors.invalid([Violation(field, sentence)])
