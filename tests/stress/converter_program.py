"""With the field's own converter on PYTHONPATH, ``converter_program.py FOLDER...`` writes FOLDER.gguf each.

The vocabularies of tiny models are none that the converter knows, so that it is told how to write them.
"""

import json
import logging
import sys
from pathlib import Path

import gguf
from conversion import get_model_class
from conversion.base import ModelBase


def write_vocabulary(model):
    tokenizer = json.loads((model.dir_model / "tokenizer.json").read_text())
    special = {token["id"] for token in tokenizer["added_tokens"]}
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    writer = model.gguf_writer
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if index in special else 1 for _, index in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)


def main():
    logging.disable(logging.WARNING)
    for folder in map(Path, sys.argv[1:]):
        config = ModelBase.load_hparams(folder, False)
        kind = get_model_class(config["architectures"][0])
        kind.set_vocab = write_vocabulary
        model = kind(folder, gguf.LlamaFileType.ALL_F32, folder.with_suffix(".gguf"))
        # Names of configs that newer versions of transformers have given up.
        share = (config.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
        model.hparams.setdefault("rotary_pct", share)
        model.hparams.setdefault("n_ctx", config.get("n_positions"))
        model.write()


main()
