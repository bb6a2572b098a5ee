"""llama.cpp as an oracle of GGUF files: it shares no code with this project, transformers or gguf's Python.

A package that carries its server is installed into the cache folder, which no other test sees.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize

from server.models.cache import make_once
from server.settings import Settings
from tests.engine.harness import greedy_requests, load, make_core, run

REQUIREMENT = "xllamacpp==2026.10.11549"
_PROGRAM = Path(__file__).with_name("llama_cpp_program.py")


def installed() -> Path:
    """The folder with the package, which is installed once per machine.

    Raises:
        subprocess.CalledProcessError: pip cannot; it says why.
    """

    def install(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary", ":all:", "--target", str(folder), REQUIREMENT]
        subprocess.run(command, check=True)

    folder = Settings().cache_dir / "tools" / REQUIREMENT.replace("==", "-")
    return make_once(folder, install, lambda stage, fraction: None)


class LlamaCpp:
    """A GGUF file served by llama.cpp, in a process of its own, as a context manager.

    Args:
        file: what to serve.
        context: tokens at most.

    Attributes:
        address: where it serves llama.cpp's interface, and OpenAI's below ``/v1``.
    """

    def __init__(self, file: Path, context: int = 1024) -> None:
        path = os.pathsep.join([str(installed()), os.environ.get("PYTHONPATH", "")])
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
        self._process = subprocess.Popen(
            [sys.executable, str(_PROGRAM), str(file), str(context)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        if not self.address:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"llama.cpp does not serve {file.name}: {self._errors.read()[-2000:]}")
        self._harmless = self.tokens("a")[-1]

    def tokens(self, text: str, *, special: bool = False) -> list[int]:
        """The text's tokens, with those that begin a text if the file says so.

        Args:
            text: what to tokenize.
            special: spelled-out special tokens are what they spell.
        """
        answer = self._ask("/tokenize", content=text, add_special=True, parse_special=special)
        return list(answer["tokens"])

    def logprobs(self, prompt: list[int], most: int) -> dict[int, float]:
        """The log probabilities of the most likely next tokens, by token.

        Args:
            prompt: at least one token.
            most: how many.
        """
        # The token that is then chosen must be whole characters and not end the text, or there is no answer.
        # Its bias is not in the probabilities.
        request = {"n_predict": 1, "n_probs": most, "temperature": 0, "logit_bias": [[self._harmless, 1e6]]}
        answer = self._ask("/completion", prompt=prompt, cache_prompt=True, **request)
        assert answer["tokens_evaluated"] == len(prompt)
        (position,) = answer["completion_probabilities"]
        return {each["id"]: each["logprob"] for each in position["top_logprobs"]}

    def __enter__(self) -> LlamaCpp:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the process."""
        try:
            self._process.communicate(timeout=60)
        finally:
            self._process.kill()
            self._errors.close()

    def _ask(self, path: str, **request: Any) -> Any:
        message = urllib.request.Request(
            self.address + path, json.dumps(request).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(message, timeout=300) as response:
            return json.load(response)


def in_float32(
    file: Path, target: Path, blocks: Mapping[str, tuple[str, np.ndarray]] = MappingProxyType({})
) -> Path:
    """The same model without blocks, or with others.

    llama.cpp rounds activations before it multiplies them with blocks or numbers of 16 bits; with float32 it
    does not.

    Args:
        file: a GGUF file.
        target: the one to write.
        blocks: of some tensors by their names, and the type of these blocks.
    """
    reader = gguf.GGUFReader(str(file))
    keys = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    writer = gguf.GGUFWriter(str(target), keys.pop("general.architecture").contents())
    for name, field in keys.items():
        element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], element)
    for tensor in reader.tensors:
        if tensor.name in blocks:
            kind, data = blocks[tensor.name]
            writer.add_tensor(tensor.name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
            continue
        weights = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        writer.add_tensor(tensor.name, weights.reshape(tuple(int(size) for size in reversed(tensor.shape))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def differences(file: Path, folder: Path, tokens: list[int], after: Iterable[int]) -> list[float]:
    """By how much the log probabilities of the 20 most likely next tokens differ from llama.cpp's.

    Args:
        file: a GGUF file.
        folder: what it was converted to, which is computed in float32.
        tokens: a text's.
        after: how many of them are read before a next one, each fewer than there are.
    """
    loaded = load(folder)
    pages = len(tokens) // 16 + 3
    request = greedy_requests([tokens], 1, prompt_logprobs=20)
    (known,) = run(make_core(loaded, pages=pages), request).values()
    assert known.prompt_logprobs is not None
    found = []
    with LlamaCpp(file, len(tokens) + 1) as oracle:
        for count in after:
            theirs = oracle.logprobs(tokens[:count], min(200, loaded.vocabulary_size))
            own = known.prompt_logprobs[count - 1].top
            found += [abs(each.logprob - theirs.get(each.token, float("-inf"))) for each in own]
    return found
