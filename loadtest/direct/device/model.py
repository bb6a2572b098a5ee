"""A model folder with random weights: complete, so that a server takes it like any other.

For 8 billion weights: 16 GB of disk, and of memory on the device while they are drawn. On a GPU drawing takes
seconds, writing as long as the disk takes (a minute at 300 MB/s); every engine reads them again, from memory
if the system has enough of it to keep them there.
"""

from __future__ import annotations

import itertools
import json
import shutil
import string
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from loadtest.direct.device.shapes import Shape
from server.models.folder import check_folder

_DTYPE = torch.bfloat16
_SHARD = "4GB"
_MARK = "shape.json"
# As Llama's own weights were drawn.
_DEVIATION = 0.02


def build(shape: Shape, folder: Path, device: torch.device) -> bool:
    """Writes a Llama of this shape, in bfloat16, unless it is there already.

    Args:
        shape: of the model.
        folder: where to write; made if it is not there.
        device: where to draw the weights.

    Returns:
        Whether it had to be written.

    Raises:
        OSError: it does not fit on the disk.
    """
    if _complete(shape, folder):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = shape.parameters * _DTYPE.itemsize, shutil.disk_usage(folder).free
    if needed * 1.01 > free:
        raise OSError(
            f"the random model takes {needed / 1e9:.1f} GB, but {folder} has only {free / 1e9:.1f} GB left; "
            "name a folder on a larger disk: --folder DIR"
        )
    transformers.utils.logging.disable_progress_bar()
    _weights(shape, device).save_pretrained(folder, max_shard_size=_SHARD)
    _tokenizer(shape.vocabulary).save_pretrained(folder)
    check_folder(folder)
    (folder / _MARK).write_text(json.dumps(shape.config))
    return True


def _complete(shape: Shape, folder: Path) -> bool:
    """The mark is written last."""
    mark = folder / _MARK
    return mark.is_file() and json.loads(mark.read_text()) == shape.config


def _weights(shape: Shape, device: torch.device) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(**shape.config, dtype=_DTYPE)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=_DTYPE)
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=_DEVIATION, generator=generator)
            else:
                parameter.fill_(1.0)
    return model


def _tokenizer(size: int) -> transformers.PreTrainedTokenizerFast:
    """As many tokens as the model has logits, so that every output is text and costs what text costs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|begin|>", "<|end|>"]
    words = itertools.chain.from_iterable(
        itertools.product(string.ascii_lowercase, repeat=length) for length in itertools.count(2)
    )
    rest = size - len(alphabet) - len(special)
    names = [*special, *alphabet, *("".join(word) for word in itertools.islice(words, rest))]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1]
    )
