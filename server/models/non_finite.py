"""Logits that are NaN or infinite: in which dtype they went beyond its range."""

from __future__ import annotations

import torch

from attention.dtypes import dtype_name
from server.errors import RefusedError
from server.models.loaded import LoadedModel


def check_computed(loaded: LoadedModel, logits: torch.Tensor, dtype: torch.dtype) -> None:
    """Refuses a model whose weights are finite and whose logits are not, with which nothing can be compared.

    Args:
        loaded: the model.
        logits: of transformers itself, or of the same model as it is served.
        dtype: of their computation.

    Raises:
        RefusedError: some are NaN or infinite.
    """
    if bool(logits.isfinite().all()):
        return
    raise RefusedError(
        f"{loaded.architecture} cannot be served: with these weights its logits in {dtype_name(dtype)} are "
        "NaN or infinite"
        + (
            "; choose --dtype bfloat16 or float32"
            if dtype == torch.float16
            else ", in transformers itself too; fetch the model again, or choose another one"
        )
    )


def check_held(loaded: LoadedModel, logits: torch.Tensor, kv_dtype: torch.dtype) -> None:
    """Refuses a KV cache whose dtype has too small a range for a model's keys and values.

    Args:
        loaded: the model.
        logits: as computed through the cache.
        kv_dtype: dtype of the cache.

    Raises:
        RefusedError: some are NaN, and the cache holds a smaller range than the model's own dtype.
    """
    most = torch.finfo(kv_dtype).max
    if most < torch.finfo(loaded.dtype).max and bool(logits.isnan().any()):
        raise RefusedError(
            f"with a KV cache in {dtype_name(kv_dtype)}, which holds numbers up to {most:g}, logits of "
            f"{loaded.architecture} are NaN; choose --kv-dtype {str(loaded.dtype)[6:]}"
            + (" or bfloat16" if kv_dtype != torch.bfloat16 and loaded.dtype == torch.float32 else "")
        )
