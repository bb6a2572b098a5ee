"""Runs kvpress, in an environment of its own: ``MODEL METHOD KEYS FILE RESULTS``.

``MODEL`` is a folder. ``FILE`` has a JSON object on each line, with the columns of kvpress's evaluation sets:
``context``, ``question``, ``answer_prefix``, ``max_new_tokens``. ``RESULTS`` gets one for each. Prompts are
the plain text of these columns, one after the other. ``KEYS`` is how many keys the prompt's last token sees,
its own included. Methods:

- ``full``: all keys.
- ``streaming``: StreamingLLM with key rotation, as kvpress has it: the context's keys are computed with all
  others and then thrown away at once but for the first 4 and the last; question and answer see these.
- ``snapkv``: SnapKV with the question at the end of the context, as kvpress's evaluation has it for methods
  that are to know the question. (Without it, what is kept is a guess of what will be asked.)
- ``choosing``: as SnapKV, but nothing is thrown away: each token of the answer after the first sees the keys
  that its own query looks at most. The weights and the masking of keys by head are kvpress's.
- ``sliding``: StreamingLLM with key rotation token by token, as the paper has it: after each, one key is
  thrown away, if there are ``KEYS``. Gives the log probabilities of the context's tokens.
- ``kept``: the tokens whose keys SnapKV keeps of the context if it judges by the last query alone.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvpress
import torch
from kvpress.utils import compute_n_kept, get_prerope_key_states
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline
from transformers.models.llama.modeling_llama import rotate_half

SINKS = 4
_OBSERVED = 32

Row = Mapping[str, Any]


def main(folder: str, method: str, keys: str, file: str, results: str) -> None:
    """The program."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    run: Callable[..., Row] = {"sliding": _sliding, "kept": _kept}.get(method, _answer)
    with torch.inference_mode(), Path(results).open("w") as output:
        for row in rows:
            found = run(model, tokenizer, method, int(keys), row)
            output.write(json.dumps(found) + "\n")
            output.flush()


def _answer(model: Any, tokenizer: Any, method: str, keys: int, row: Row) -> Row:
    """An answer by kvpress's own pipeline, and the prompt's tokens."""
    asked = {name: row[name] for name in ("context", "question", "answer_prefix")}
    if method == "snapkv":
        asked |= {"context": row["context"] + row["question"], "question": ""}
    pipe = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer)
    parts = pipe.preprocess(
        asked["context"], [asked["question"]], asked["answer_prefix"], max_context_length=1 << 20
    )
    context, after = parts["context_ids"].shape[1], parts["questions_ids"][0].shape[1]
    press = None
    if method == "streaming":
        press = kvpress.StreamingLLMPress(_ratio(context, keys - after), n_sink=SINKS)
        press = kvpress.KeyRerotationPress(press)
    elif method == "snapkv":
        press = kvpress.SnapKVPress(_ratio(context, keys - after), window_size=_OBSERVED)
    context_text = asked.pop("context")
    with _choosing(model, keys) if method == "choosing" else contextlib.nullcontext():
        answer = pipe(context_text, **asked, press=press, max_new_tokens=row["max_new_tokens"])["answer"]
    return {
        "predicted_answer": answer,
        "prompt": torch.cat([parts["context_ids"], *parts["questions_ids"]], dim=1)[0].tolist(),
    }


@contextlib.contextmanager
def _choosing(model: Any, keys: int) -> Iterator[None]:
    whole: dict[int, torch.Tensor] = {}

    def choose(module: Any, _: Any, given: Mapping[str, Any]) -> None:
        hidden, rotation = given["hidden_states"], given["position_embeddings"]
        module.masked_key_indices = None
        if hidden.shape[1] > 1:
            return
        cos, sin = (each.unsqueeze(1) for each in rotation)
        own = get_prerope_key_states(module, hidden)
        own = own * cos + rotate_half(own) * sin
        held = torch.cat([given["past_key_values"].layers[module.layer_idx].keys, own], dim=2)
        weights = kvpress.SnapKVPress.compute_window_attention(module, hidden, held, 1, rotation)
        scores = weights[0, :, 0].unflatten(0, (held.shape[1], -1)).mean(dim=1)
        others = scores.topk(scores.shape[1] - (keys - 1), dim=-1, largest=False).indices
        heads = torch.arange(held.shape[1])[:, None].expand_as(others)
        module.masked_key_indices = torch.zeros_like(others).flatten(), heads.flatten(), others.flatten()
        whole[module.layer_idx] = held

    def restore(module: Any, _: Any, given: Mapping[str, Any], output: Any) -> None:
        # kvpress masks keys in the cache itself, for good.
        if module.masked_key_indices is not None:
            given["past_key_values"].layers[module.layer_idx].keys = whole.pop(module.layer_idx)

    layers = [layer.self_attn for layer in model.model.layers]
    hooks = [layer.register_forward_pre_hook(choose, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(restore, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            layer.masked_key_indices = None


def _ratio(context: int, kept: int) -> float:
    """The share to throw away so that ``kept`` of ``context`` keys stay."""
    ratio = 1 - (kept + 0.5) / context
    assert compute_n_kept(context, ratio) == kept
    return ratio


@dataclass
class _Rotated(kvpress.ScorerPress):
    """StreamingLLM with key rotation, where kvpress takes no wrapper for a press."""

    def compress(self, *given: Any) -> Any:
        inner = kvpress.StreamingLLMPress(self.compression_ratio, n_sink=SINKS)
        return kvpress.KeyRerotationPress(inner).compress(*given)


def _sliding(model: Any, tokenizer: Any, method: str, keys: int, row: Row) -> Row:
    ids = tokenizer.encode(row["context"], return_tensors="pt", add_special_tokens=False)
    press = kvpress.DecodingPress(_Rotated(), compression_interval=1, target_size=keys - 1)
    cache = DynamicCache()
    logits = [model(input_ids=ids[:, : keys - 1], past_key_values=cache).logits[0]]
    with press(model):
        for token in ids[0, keys - 1 : -1]:
            # Without positions of its own, a token comes behind those in the cache.
            logits.append(model(input_ids=token.view(1, 1), past_key_values=cache).logits[0])
            assert cache.get_seq_length() == keys - 1
    known = torch.cat(logits).log_softmax(dim=-1)
    return {"prompt": ids[0].tolist(), "logprobs": list(_of_next(known, ids[0]))}


def _of_next(logprobs: torch.Tensor, ids: torch.Tensor) -> Iterator[float]:
    for row, token in zip(logprobs, ids[1:], strict=True):
        yield float(row[token])


@dataclass
class _LastQuery(kvpress.SnapKVPress):
    """SnapKV that judges by one query, each token by itself, and tells what it keeps."""

    window_size: int = 1
    kernel_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kept: list[list[list[int]]] = []

    def score(self, *given: Any) -> torch.Tensor:
        scores: torch.Tensor = super().score(*given)
        kept = scores[0].topk(compute_n_kept(scores.shape[2], self.compression_ratio), dim=-1).indices
        self.kept.append(kept.sort(dim=-1).values.tolist())
        return scores


def _kept(model: Any, tokenizer: Any, method: str, keys: int, row: Row) -> Row:
    """Positions by layer and KV head."""
    ids = tokenizer.encode(row["context"], return_tensors="pt", add_special_tokens=False)
    press = _LastQuery(_ratio(ids.shape[1], keys))
    with press(model):
        model.model(input_ids=ids, past_key_values=DynamicCache())
    return {"prompt": ids[0].tolist(), "kept": press.kept}


if __name__ == "__main__":
    main(*sys.argv[1:])
