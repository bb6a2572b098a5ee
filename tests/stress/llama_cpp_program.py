"""Serves a GGUF file with llama.cpp on a loopback port until standard input ends: ``FILE CONTEXT``.

The one line of standard output is the address. Keys, values and all else are in float32, where the file's
weights are.
"""

from __future__ import annotations

import sys
from typing import Any


def main(file: str, context: int) -> None:
    """The program."""
    import xllamacpp  # type: ignore[import-not-found]  # only here, and only where it is installed

    given: Any = xllamacpp.CommonParams()
    given.model.path = file
    given.n_ctx, given.n_parallel = context, 1
    given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    given.hostnames, given.port = ["127.0.0.1"], 0
    given.warmup = given.fit_params = given.ctx_shift = given.use_jinja = False
    given.cache_ram_mib = 0
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(given)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
