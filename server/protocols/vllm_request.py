"""From a request of ``VllmEngine`` to Longspan's own; every field is used, or refused by its name."""

from __future__ import annotations

from collections.abc import Iterator

from smg_grpc_proto import vllm_engine_pb2 as pb

from longspan.v1 import inference_pb2, types_pb2
from server.api.checks import refuse
from server.api.errors import Violation

_SAMPLING = "sampling_params"
# In the protocol's words: what a field asks for that this server doesn't do.
_REFUSED = {
    "kv_transfer_params": "hands over a KV cache",
    "kv_transfer_params_json": "hands over a KV cache",
    "mm_inputs": "has images or videos",
    "extra_mm_inputs": "has images or videos",
    "media_refs": "has images or videos",
}
_REFUSED_SAMPLING = {
    **dict.fromkeys(
        ("json_schema", "regex", "grammar", "structural_tag", "json_object", "choice"),
        "constrains the output",
    ),
    "grammar_from_first_token": "constrains the output",
}


def generate_request(request: pb.GenerateRequest, longest: int) -> inference_pb2.GenerateRequest:
    """Longspan's form of a request, whose values are then checked like those of any other.

    Unset fields take the protocol's defaults, which are zeros, and not what the model's makers recommend:
    ``GetModelInfo`` tells the gateway those.

    Args:
        request: as it came.
        longest: tokens of a prompt, at most, to which ``truncate_prompt_tokens`` -1 cuts.

    Raises:
        ServiceError: the fields at fault.
    """
    refuse(_faults(request))
    sampling = request.sampling_params
    converted = inference_pb2.GenerateRequest(
        request_id=request.request_id,
        sampling=_sampling(sampling),
        stop=_stop(sampling),
        n=sampling.n or 1,
        keep_special_tokens=not sampling.skip_special_tokens,
    )
    if request.WhichOneof("input") == "text":
        converted.text = request.text
    else:
        converted.token_ids.ids.extend(_cut(request, longest))
    if sampling.HasField("logprobs"):
        converted.logprobs.output = sampling.logprobs
    if sampling.HasField("prompt_logprobs"):
        converted.logprobs.prompt = sampling.prompt_logprobs
    return converted


def _cut(request: pb.GenerateRequest, longest: int) -> list[int]:
    """The prompt's token ids: its end, where the request says how many."""
    ids = list(request.tokenized.input_ids)
    if not request.sampling_params.HasField("truncate_prompt_tokens"):
        return ids
    most = request.sampling_params.truncate_prompt_tokens
    return ids[-(longest if most == -1 else most) :]


def _sampling(sampling: pb.SamplingParams) -> types_pb2.SamplingParams:
    converted = types_pb2.SamplingParams(
        temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
        top_k=sampling.top_k,
        top_p=sampling.top_p or 1.0,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty or 1.0,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
    )
    if sampling.HasField("seed"):
        converted.seed = sampling.seed % 2**64
    return converted


def _stop(sampling: pb.SamplingParams) -> types_pb2.StopConditions:
    return types_pb2.StopConditions(
        max_tokens=sampling.max_tokens if sampling.HasField("max_tokens") else None,
        min_tokens=sampling.min_tokens,
        stop_strings=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        include_stop_string=sampling.include_stop_str_in_output,
    )


def _faults(request: pb.GenerateRequest) -> Iterator[Violation]:
    """What Longspan has no field for."""
    sampling = request.sampling_params
    for field, _ in request.ListFields():
        if field.name in _REFUSED:
            yield Violation(field.name, f"{_REFUSED[field.name]}, which this server does not; leave it out")
    for field, _ in sampling.ListFields():
        if field.name in _REFUSED_SAMPLING:
            sentence = f"{_REFUSED_SAMPLING[field.name]}, which this server does not; leave it out"
            yield Violation(f"{_SAMPLING}.{field.name}", sentence)
    if request.data_parallel_rank:
        yield Violation("data_parallel_rank", f"is {request.data_parallel_rank}; this server has rank 0 only")
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(sampling, name) < 0:
            sentence = f"is {getattr(sampling, name)}; this server gives so many tokens, and not all"
            yield Violation(f"{_SAMPLING}.{name}", sentence)
    if any(token < 0 for token in sampling.logit_bias):
        yield Violation(f"{_SAMPLING}.logit_bias", "names a negative token; token ids begin at 0")
    if request.WhichOneof("input") == "text":
        for name in ("prompt_logprobs", "truncate_prompt_tokens"):
            if sampling.HasField(name):
                yield Violation(f"{_SAMPLING}.{name}", "is for prompts of token ids; send tokenized")
    if sampling.HasField("truncate_prompt_tokens"):
        most = sampling.truncate_prompt_tokens
        if most != -1 and most < 1:
            sentence = f"is {most}; it must be at least 1, or -1 for as many as the model takes"
            yield Violation(f"{_SAMPLING}.truncate_prompt_tokens", sentence)
