"""Changes of a checkpoint's files to values that their keys can have, each from a seed.

``mutations`` makes what no reader takes. Most of these are read, and some of them change what is computed.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.models.changes import CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, put

# Keys that files of other models have, with values that they have there or that end some model's requests.
_OTHERS: dict[str, dict[str, list[Any]]] = {
    CONFIG: {
        "tie_word_embeddings": [True, False],
        "sliding_window": [1, 3, 4096],
        "use_sliding_window": [True],
        "attention_bias": [True],
        "partial_rotary_factor": [0.25, 0.5, 1.0],
        "rope_theta": [1.0, 1e-6, 1e30, 500_000.0],
        "rope_scaling": [
            {"type": "linear", "factor": 4.0},
            {"rope_type": "dynamic", "factor": 2.0},
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
        ],
        "final_logit_softcapping": [30.0, 1e-30],
        "attn_logit_softcapping": [50.0, 1e-30],
        "eos_token_id": [0, 2, [1, 2], list(range(320))],
        "bos_token_id": [1, 319, 320],
        "pad_token_id": [0, -1, 319, 320],
        "decoder_start_token_id": [0, 319, 320, None],
        "forced_bos_token_id": [0, 319, 320],
        "is_decoder": [True, False],
        "is_encoder_decoder": [True, False],
        "add_cross_attention": [True],
        "use_cache": [False],
        "dtype": ["float16", "bfloat16", "float64"],
        "torch_dtype": ["float16", "float8_e4m3fn"],
        "architectures": [["LlamaForCausalLM"], ["BertModel"], ["T5ForConditionalGeneration"], [], None],
        "num_labels": [1, 2, 5],
        "id2label": [{"0": "a"}, {"0": "a", "1": "b"}, {"x": "y"}, {"5": "a"}],
        "label2id": [{"a": 0}],
        "problem_type": ["regression", "multi_label_classification", "other"],
        "type_vocab_size": [0, 1, 2],
        "position_embedding_type": ["absolute", "relative_key"],
        "chunk_size_feed_forward": [1, 7],
        "max_position_embeddings": [1, 2, 3, 5, 64],
        "return_dict": [False],
        "output_hidden_states": [True],
        "output_attentions": [True],
        "torchscript": [True],
        "scale_embedding": [True],
        "attn_implementation": ["eager", "flex_attention"],
        "initializer_range": [0.0],
        "hidden_act": ["relu", "gelu", "silu", "tanh"],
        "layer_types": [["sliding_attention", "full_attention"], ["full_attention"] * 2],
        "head_dim": [8, 16, 32],
        "logit_scale": [0.0, 1e38],
        "rms_norm_eps": [0.0, 1e38, -1.0],
        "layer_norm_eps": [0.0, 1e38, -1.0],
    },
    GENERATION: {
        "do_sample": [True, False],
        "temperature": [0.0, 1e-30, 100.0],
        "top_p": [1e-6],
        "top_k": [1, 10**9],
        "min_p": [1.0],
        "repetition_penalty": [1.2, 1e-30, 1e38],
        "num_beams": [4],
        "max_length": [1, 20],
        "min_length": [5, 10**6],
        "max_new_tokens": [0, 1],
        "no_repeat_ngram_size": [1, 2],
        "eos_token_id": [0, [0, 1], list(range(320))],
        "bad_words_ids": [[[1]], [[index] for index in range(320)]],
        "suppress_tokens": [[1, 2], list(range(320))],
        "begin_suppress_tokens": [[1, 2], list(range(320))],
        "forced_bos_token_id": [0, 319, 320],
        "forced_eos_token_id": [0, 319, [1, 2]],
        "forced_decoder_ids": [[[1, 5]]],
        "decoder_start_token_id": [0, 319, 320],
        "sequence_bias": [[[[1], -1.0]]],
        "length_penalty": [-5.0],
        "early_stopping": [True, "never"],
    },
    TOKENIZER: {
        "normalizer": [
            None,
            {"type": "Lowercase"},
            {"type": "Prepend", "prepend": "x"},
            {"type": "Replace", "pattern": {"Regex": "."}, "content": ""},
        ],
        "pre_tokenizer": [None, {"type": "Whitespace"}, {"type": "Digits", "individual_digits": True}],
        "decoder": [
            None,
            {"type": "WordPiece", "prefix": "##", "cleanup": True},
            {"type": "Strip", "content": "a", "start": 9, "stop": 9},
            {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
        ],
        "post_processor": [None],
        "truncation": [
            {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0},
        ],
        "padding": [
            {
                **{"strategy": {"Fixed": 4096}, "direction": "Right", "pad_to_multiple_of": None},
                **{"pad_id": 0, "pad_type_id": 0, "pad_token": "x"},
            },
        ],
        "added_tokens": [[]],
    },
    TOKENIZER_CONFIG: {
        "add_bos_token": [True],
        "add_eos_token": [True],
        "bos_token": ["<new>", "a", None],
        "eos_token": ["<new>", "a", None],
        "unk_token": ["<new>", "a"],
        "pad_token": ["<new>", None],
        "mask_token": ["<new>", "a", "[MASK]"],
        "add_prefix_space": [True],
        "clean_up_tokenization_spaces": [True],
        "model_max_length": [1, 3, 10**30],
        "padding_side": ["left"],
        "truncation_side": ["left"],
        "additional_special_tokens": [["a"], ["<new>"]],
        "extra_special_tokens": [{"image_token": "<new>"}, ["<new>"]],
        "model_input_names": [["input_ids"], ["input_ids", "token_type_ids"], []],
        "tokenizer_class": ["LlamaTokenizer", "BertTokenizer", "T5Tokenizer", "None", "PreTrainedTokenizer"],
        "split_special_tokens": [True],
        "do_lower_case": [True],
        "chat_template": [
            "{{ messages }}",
            "",
            "{{ messages[5].content }}",
            [{"name": "default", "template": "{{ messages[0].content }}"}],
            {"default": "x"},
        ],
    },
}


def vary(folder: Path, name: str, seed: int) -> None:
    """Changes one or two values of a file.

    Args:
        folder: the checkpoint, of which the file may be linked elsewhere, or absent.
        name: the file.
        seed: the same one gives the same changes.
    """
    rng = random.Random(f"vary {name} {seed}")
    file = folder / name
    content = json.loads(file.read_bytes()) if file.exists() else {}
    for _ in range(rng.randint(1, 2)):
        others = _OTHERS.get(file.name, {})
        if isinstance(content, dict) and others and rng.random() < 0.5:
            key = rng.choice(list(others))
            content[key] = rng.choice(others[key])
        else:
            _change(content, rng)
    put(file, json.dumps(content).encode())


def _change(content: Any, rng: random.Random) -> None:
    """Changes a value of JSON somewhere in it to one of the same kind."""
    part = content
    while isinstance(part, dict | list) and part:
        key = rng.choice(list(part) if isinstance(part, dict) else range(len(part)))
        value = part[key]
        if isinstance(value, dict | list) and value and rng.random() < 0.8:
            part = value
            continue
        if rng.random() < 0.15:
            del part[key]
        else:
            part[key] = _other(value, content, rng)
        return


def _other(value: Any, content: Any, rng: random.Random) -> Any:
    match value:
        case bool():
            return not value
        case int():
            return rng.choice([value + 1, value - 1, 2 * value, value // 2, -value, 0, 1])
        case float():
            return rng.choice([2 * value, value / 2, -value, 0.0, 1e30 * value, 1e-30 * value])
        case str():
            texts = (
                [one for one in content.values() if isinstance(one, str)] if isinstance(content, dict) else []
            )
            return rng.choice([*texts, value + "x", value[:1], ""])
        case None:
            return rng.choice([0, 1, 2, True, 0.5])
        case _:
            return rng.choice([None, type(value)()])
