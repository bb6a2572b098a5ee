"""A server that stretches a model's rotary embeddings as asked, or as the model says."""

from __future__ import annotations

import pytest
import torch
import transformers

from server.engine.build import build_engine
from server.errors import RefusedError
from server.messages import Submit
from server.models.load import load_model
from server.models.rope import read_scaling
from server.settings import Settings
from tests.engine.harness import GREEDY, make_core, run
from tests.engine.rope.texts import FACTORS, IN_CACHE, OWN, WINDOW, prompts_of

SCALINGS = {
    "default": {},
    "linear": {"factor": "4"},
    "dynamic": {"factor": "4"},
    "yarn": {"factor": "4", "beta_fast": "16", "beta_slow": "2", "attention_factor": "1.2"},
    "llama3": {"factor": "4", "low_freq_factor": "1", "high_freq_factor": "4", "rope_theta": "5000"},
    "longrope": {"factor": "4", **{name: ",".join(map(str, values)) for name, values in FACTORS.items()}},
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_an_overridden_scaling_is_transformers_own(folders, kind):
    scaling = read_scaling(kind, SCALINGS[kind])
    folder = folders["yarn" if kind == "default" else "default"]
    loaded = load_model(folder, "float32", "cpu", 4 * OWN, lambda *_: None, scaling=scaling)
    assert loaded.context_length == 4 * OWN
    rope = {"rope_type": kind, "rope_theta": 10000.0, **scaling.values}
    if kind in ("yarn", "llama3", "longrope"):
        rope["original_max_position_embeddings"] = OWN
    config = transformers.AutoConfig.from_pretrained(
        folder, rope_parameters=rope, max_position_embeddings=OWN
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, attn_implementation="eager"
    ).eval()
    (prompt,) = prompts_of(95)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt]), use_cache=False).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    neighbor, echo = (
        Submit(id=i, prompt=text, sampling=GREEDY, max_tokens=1, prompt_logprobs=0)
        for i, text in enumerate((prompt[5:30], prompt))
    )
    for budget in (512, 20):
        core = make_core(loaded, page_size=4, max_batch_tokens=budget, max_running=20)
        entries = run(core, [neighbor, echo])[1].prompt_logprobs
        found = torch.tensor([entry.chosen.logprob for entry in entries])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


def build(folder, **settings):
    more = {"device": "cpu", "kv_memory": "1MiB", "threads": torch.get_num_threads(), "kernel": "reference"}
    return build_engine(Settings(**more | settings), folder, lambda *_: None)


def test_the_server_takes_long_contexts_through_a_short_model(folders):
    cache = {"attention": "sliding_window", "attention_option": IN_CACHE["options"]}
    core, ready = build(folders["default"], max_context=5000, **cache)
    assert ready.context_length == 5000
    assert ready.attention_options["positions"] == "cache"
    assert len(core.runner.executor.rotations) == 2
    assert build(folders["default"], **cache)[1].context_length == OWN
    with pytest.raises(RefusedError, match="sinks and window together are 41 positions, more than the 40"):
        build(
            folders["default"],
            attention="sliding_window",
            attention_option={**IN_CACHE["options"], "window": "38"},
        )
    with pytest.raises(RefusedError, match=r"--max-context 5000 is more than the model's own 40 positions"):
        build(folders["default"], max_context=5000, attention="sliding_window", attention_option=WINDOW)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_the_server_takes_what_the_model_says(folders, kind):
    core, ready = build(folders[kind])
    assert ready.context_length == 4 * OWN
    assert core.runner.rope.kind == kind
    _, ready = build(folders[kind], max_context=25)
    assert ready.context_length == 25


def test_the_server_stretches_as_asked(folders):
    _, ready = build(folders["default"], rope_scaling="yarn", rope_option={"factor": "3"})
    assert ready.context_length == 3 * OWN
