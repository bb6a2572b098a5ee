"""Flags that engineers know from vLLM, SGLang and llama.cpp, and their names here."""

from __future__ import annotations

from collections.abc import Sequence

_ONE_DEVICE = "Longspan serves a model on one device; leave it out"
_NONE = "there is none here, because "
_WHOLE = f"{_NONE}a model is on one device as a whole (--device); leave it out"
_ENCODERS = f"{_NONE}a model says itself what it can do, like an encoder to embed; leave it out"
_POOLING = f"{_NONE}each request of an encoder may name its own (pooling); leave it out"
_IN_FOLDER = f"{_NONE}the tokenizer is the model's own; leave it out"
_NEWEST = (
    f"{_NONE}hub names are taken at their newest revision; fetch another one yourself, for --model FOLDER"
)
_CODE = f"{_NONE}no code of a model is ever run; leave it out"
_SEED = f"{_NONE}each request may have its own (seed); leave it out"
_SWAP = f"{_NONE}a sequence that gives up its pages is computed again; leave it out"
_TOKENS = "--identities, a file with hashes of tokens; longspan token writes it"
HERE = {
    "-m": "--model",
    "-hf": "--model, with a hub name or a GGUF file",
    "-hfr": "--model, with a hub name or a GGUF file",
    "--hf-repo": "--model, with a hub name or a GGUF file",
    "-c": "--max-context, for each sequence and not for all together",
    "-a": "--model-name",
    "--alias": "--model-name",
    "-t": "--threads",
    "-np": "--max-running",
    "--parallel": "--max-running",
    "-b": "--max-batch-tokens",
    "--batch-size": "--max-batch-tokens",
    "-ngl": _WHOLE,
    "--n-gpu-layers": _WHOLE,
    "--gpu-layers": _WHOLE,
    "--embedding": _ENCODERS,
    "--embeddings": _ENCODERS,
    "--is-embedding": _ENCODERS,
    "--task": _ENCODERS,
    "--runner": _ENCODERS,
    "--pooling": _POOLING,
    "--tokenizer": _IN_FOLDER,
    "--tokenizer-path": _IN_FOLDER,
    "--revision": _NEWEST,
    "--trust-remote-code": _CODE,
    "--seed": _SEED,
    "--random-seed": _SEED,
    "--swap-space": _SWAP,
    "--max-model-len": "--max-context",
    "--context-length": "--max-context",
    "--ctx-size": "--max-context",
    "--max-num-seqs": "--max-running",
    "--max-running-requests": "--max-running",
    "--max-queued-requests": "--max-queue",
    "--max-num-batched-tokens": "--max-batch-tokens",
    "--chunked-prefill-size": "--max-batch-tokens",
    "--kv-cache-dtype": "--kv-dtype",
    "--speculative-config": "--speculate",
    "--speculative-algorithm": "--speculate",
    "--speculative-draft-model-path": "--draft-model",
    "--model-draft": "--draft-model",
    "-md": "--draft-model",
    "--speculative-num-draft-tokens": "--draft-tokens",
    "--num-speculative-tokens": "--draft-tokens",
    "--draft-max": "--draft-tokens",
    "--block-size": "--page-size",
    "--attention-backend": "--kernel",
    "--quantization": "--weights",
    "--watchdog-timeout": "--engine-step-timeout",
    "--served-model-name": "--model-name",
    "--model-path": "--model",
    "--download-dir": "--cache-dir",
    "--api-key": _TOKENS,
    "--ssl-certfile": "--tls-certificate",
    "--ssl-cert-file": "--tls-certificate",
    "--ssl-keyfile": "--tls-key",
    "--ssl-key-file": "--tls-key",
    "--ssl-ca-certs": "--tls-client-ca",
    "--tensor-parallel-size": _ONE_DEVICE,
    "--tp-size": _ONE_DEVICE,
    "--tp": _ONE_DEVICE,
    "-tp": _ONE_DEVICE,
    "--pipeline-parallel-size": _ONE_DEVICE,
    "--pp": _ONE_DEVICE,
    "--data-parallel-size": _ONE_DEVICE,
    "--dp": _ONE_DEVICE,
    "--enforce-eager": "--no-cuda-graphs",
    "--disable-cuda-graph": "--no-cuda-graphs",
    "--enable-prefix-caching": "--prefix-cache, and it is on unless you turn it off",
    "--no-enable-prefix-caching": "--no-prefix-cache",
    "--disable-radix-cache": "--no-prefix-cache",
    "--gpu-memory-utilization": "--kv-memory-share, a share of the memory that is free after loading",
    "--mem-fraction-static": "--kv-memory-share, a share of the memory that is free after loading",
}


def called_here(arguments: Sequence[str]) -> str | None:
    """The sentence for the first flag of another server among a command's arguments, if there is one."""
    for argument in arguments:
        name = argument.partition("=")[0]
        if (here := HERE.get(name)) is not None:
            return f"{name}: {f'here it is called {here}' if here.startswith('--') else here}."
    return None


def positional(arguments: Sequence[str]) -> str:
    """The sentence for arguments that belong to no flag."""
    first = arguments[0]
    more = f"; what are {' '.join(arguments[1:])}?" if arguments[1:] else "."
    return f"{first!r} belongs to no flag. A model is named with a flag here: --model {first}{more}"
