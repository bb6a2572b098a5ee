"""The same load in transformers' own continuous batching."""

from __future__ import annotations

import logging
import time

import torch
import transformers

from loadtest.direct.device.machine import memory_in_use


def continuous_batching(
    folder: str,
    device: torch.device,
    warmup: list[list[int]],
    prompts: list[list[int]],
    output_tokens: int,
) -> tuple[float, str, int]:
    """Generates greedily for all prompts at once, after a warm-up of the same size.

    The manager stays between the two, so that neither its cache's allocation nor the capture of CUDA graphs
    counts. On a GPU transformers takes its own defaults, as for a user. On the CPU it would
    take more than half of the machine's memory for its cache; there it gets what the load needs.

    Args:
        folder: the model.
        device: where to run.
        warmup: token ids; other prompts, since it caches prefixes.
        prompts: token ids.
        output_tokens: of each.

    Returns:
        Generated tokens per second, of all streams together; the implementation of attention that it chose;
        and bytes in use after it, see ``machine.memory_in_use``.

    Raises:
        RuntimeError: it gave another number of tokens than was asked for.
    """
    # It warns that a persistent manager is made for one load, which is its use here.
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32 if device.type == "cpu" else "auto",
        device_map={"": device},
        attn_implementation="sdpa",
        local_files_only=True,
    ).eval()
    generation = transformers.GenerationConfig(
        max_new_tokens=output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    needed = sum(len(prompt) + output_tokens for prompt in prompts)
    limits = None
    if device.type == "cpu":
        limits = transformers.generation.ContinuousBatchingConfig(
            num_blocks=needed // 256 + len(prompts) + 1, max_batch_tokens=needed
        )
    try:
        for batch in (warmup, prompts):
            began = time.perf_counter()
            results = model.generate_batch(
                batch,
                generation_config=generation,
                continuous_batching_config=limits,
                persistent_manager=True,
            )
            seconds = time.perf_counter() - began
        attention, memory = str(model.config._attn_implementation), memory_in_use(device)
    finally:
        model.destroy_cached_continuous_batching_manager()
    counts = [len(result.generated_tokens) for result in results.values()]
    if counts != [output_tokens] * len(prompts):
        raise RuntimeError(
            f"transformers gave {sum(counts)} tokens for {len(counts)} prompts instead of "
            f"{output_tokens} for each of {len(prompts)}"
        )
    return sum(counts) / seconds, attention, memory
