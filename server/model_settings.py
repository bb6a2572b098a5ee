"""Settings of the model: what is served, in which form, how long its context is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings

from server.setting_types import Options


class ModelSettings(BaseSettings):
    """The first of all settings."""

    model: str | None = Field(
        None,
        description="Local Hugging Face folder, hub name, GGUF file, minilm (a small encoder) or annalog (a "
        "small encoder-decoder). Without it: SmolLM2-135M-Instruct.",
    )
    allow_pickle: bool = Field(
        False, description="Read a folder's weights from pickles (pytorch_model.bin), as weights only."
    )
    model_name: str | None = Field(None, description="Name in requests and metrics. Without it: from MODEL.")
    chat_template: str | None = Field(
        None,
        description="Name of one of the model's chat templates, or a Jinja file. Without it: its default.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype of the model. auto: float32 on CPU, the checkpoint's own elsewhere."
    )
    weights: Literal["auto", "float", "int8", "int4", "fp8"] = Field(
        "auto",
        description="Form of the linear layers' weights. float: exact. On CPU int8, int4: faster, with "
        "activations rounded to 8 bits. On CUDA int8, or fp8, less exact: half the bytes, by "
        "torchao. auto: on CPU int4 or int8 for each layer whose weights they hold exactly, as many GGUF "
        "files', else float.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if there is one.")
    max_context: int | None = Field(
        None,
        ge=2,
        le=2**31 - 1,
        description="Most tokens of prompt and output together. Without it: the model's own.",
    )

    generation_config: Literal["auto", "none"] = Field(
        "auto",
        description="Where a request leaves sampling unset. auto: as the model's generation_config.json has "
        "it; none: temperature 1, all tokens, no penalties.",
    )

    rope_scaling: Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"] | None = Field(
        None,
        description="How rotary positions are stretched; default: not at all. Without it: as the model says.",
    )
    rope_option: Options = Field(
        default_factory=dict, description="Detail of --rope-scaling, like factor=4; may be repeated."
    )
