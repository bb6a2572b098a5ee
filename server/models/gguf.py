"""A GGUF file to a Hugging Face folder, without loss.

A program: ``python -m server.models.gguf FILE FOLDER`` prints ``FRACTION STAGE`` lines; on failure, the last
line of standard error is the reason.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers

from server.models.gguf_tokenizer import read_tokenizer


def convert(file: Path, folder: Path) -> None:
    """Writes config, weights, tokenizer and chat template.

    Weights keep their exact values: quantized ones are stored as float32, since ``scale * q + offset`` has
    no shorter form; 16-bit ones as they are, where the file's float32 tensors lose nothing by it.

    Args:
        file: a GGUF file of a causal language model whose architecture transformers can read.
        folder: where to write; made if missing.

    Raises:
        ValueError: the file can't be converted; the message says why.
    """
    _parse_once()
    _say(0.0, "reading")
    reader = gguf.GGUFReader(str(file))
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    if metadata.get("split.count", 1) > 1:
        raise ValueError("it is one part of several; join them with llama-gguf-split --merge")
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    config = transformers.AutoConfig.from_pretrained(**where)
    _say(0.4, "weights")
    # Linear layers stay plain ones: without this, newer versions keep some architectures' weights in blocks.
    blocks = getattr(transformers, "GgufConfig", None)
    plain = {"quantization_config": blocks(dequantize=True)} if blocks else {}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        **where, **plain, config=config, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"it has no tensor for {sorted(info['missing_keys'])[0]}")
    model = model.to(_exact_dtype(model, {tensor.tensor_type.name for tensor in reader.tensors}))
    _say(0.7, "tokenizer")
    tokenizer = read_tokenizer(file, metadata)
    _say(0.8, "writing")
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    readable = (folder / "config.json").stat().st_mode
    for weights in folder.glob("*.safetensors"):  # written for their owner only, unlike the rest
        weights.chmod(readable)


def _parse_once() -> None:
    """Makes a conversion several times faster.

    transformers parses the file anew for every part it wants, seconds each, and builds gguf's table of
    tensor names once per module of the model. This process converts one file and ends.
    """
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)


def _exact_dtype(model: Any, types: set[str]) -> torch.dtype:
    """The shortest number format that holds every weight exactly."""
    for name, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        if types <= {name, "F32"} and all(
            torch.equal(weight.to(dtype).to(weight.dtype), weight) for weight in model.state_dict().values()
        ):
            return dtype
    return torch.float32


def _say(fraction: float, stage: str) -> None:
    print(fraction, stage, flush=True)


def main() -> None:
    """The program."""
    transformers.logging.disable_progress_bar()
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        sys.exit(reason)


if __name__ == "__main__":
    main()
