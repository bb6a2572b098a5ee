"""Beam searches as transformers has them, and the same for the engine."""

from __future__ import annotations

import torch
import transformers

from server.messages import Beams, Sampling, StopTexts, Submit
from tests.engine.journal import prompts_of

PAGE = 8
EARLY = {False: "heuristic", True: "full", "never": "never"}
PROMPTS = prompts_of(9, 30, 17, 8, 41, 5, 22, 13, 36)
MOST = 12


class OfOutput(transformers.LogitsProcessor):
    """Presence and frequency penalties, which transformers lacks."""

    def __init__(self, prompt, presence, frequency):
        self.prompt, self.presence, self.frequency = len(prompt), presence, frequency

    def __call__(self, input_ids, scores):
        counts = torch.zeros_like(scores)
        output = input_ids[:, self.prompt :]
        counts.scatter_add_(1, output, torch.ones_like(output, dtype=scores.dtype))
        return scores - self.presence * (counts > 0) - self.frequency * counts


def generate(own, prompt, max_tokens, n=1, stops=None, **options):
    """What transformers' ``generate`` gives, padded with -1."""
    ids = torch.tensor([prompt])
    penalties = [options.pop(name, 0.0) for name in ("presence_penalty", "frequency_penalty")]
    with torch.no_grad():
        return own.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_tokens,
            num_return_sequences=n,
            eos_token_id=stops or None,
            pad_token_id=-1,
            logits_processor=[OfOutput(prompt, *penalties)],
            **options,
        )


def generated(own, prompt, *args, **options):
    """The outputs of transformers' ``generate``, the best first, without padding."""
    found = generate(own, prompt, *args, **options)
    return [[token for token in row if token != -1] for row in found[:, len(prompt) :].tolist()]


def submit(id_, prompt, max_tokens, n=1, stops=(), priority=0, strings=(), **options):
    """The same for the engine; its outputs are those of ``id_``, ``id_`` + 100, and so on."""
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    return Submit(
        id=id_,
        prompt=prompt,
        sampling=Sampling(
            temperature=0.0,
            no_repeat_ngram=options.get("no_repeat_ngram_size", 0),
            logit_bias={token: bias for (token,), bias in options.get("sequence_bias", {}).items()},
            **{name: options[name] for name in penalties if name in options},
        ),
        max_tokens=max_tokens,
        min_tokens=options.get("min_new_tokens", 0),
        stop_token_ids=list(stops),
        priority=priority,
        beams=Beams(
            count=options["num_beams"],
            length_penalty=options.get("length_penalty", 1.0),
            early_stopping=EARLY[options.get("early_stopping", False)],
            others=[id_ + 100 * i for i in range(1, n)],
            stop=StopTexts(list(strings), False, 1) if strings else None,
        ),
    )


def outputs(outcomes, id_, n):
    assert all(outcomes[id_ + 100 * i].finish is not None for i in range(n))
    return [outcomes[id_ + 100 * i].tokens for i in range(n)]
