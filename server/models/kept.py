"""Packed models kept on disk, so that a start reads 4 or 8 bits a weight instead of making them again.

What is kept was proven when it was made: that the layers are what attention was told, that the lean layers
compute what transformers' do, that packing changed no more than rounding can. A kept model is good for the
very files and versions that it was made from. Each start compares its logits with those of the making, so
that this machine's operators, kernel and cache format are proven anew.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attention.kernels.cpu.native import NativeError
from attention.types import LayerSpec
from server.models.folder import weight_files
from server.models.fused import FusedLayer, Norm
from server.models.limits import context_length
from server.models.loaded import LoadedModel
from server.models.packed_file import BrokenFileError, read, write
from server.models.quantized import native
from server.models.quantized.embedding import QuantizedEmbedding
from server.models.quantized.layer import QuantizedLayer
from server.models.quantized.linear import QuantizedLinear
from server.models.quantized.model import Config, QuantizedModel
from server.models.quantized.packing import Packed
from server.models.quantized.stack import QuantizedStack
from server.models.quantized.workspace import Workspace

log = logging.getLogger("longspan.models")

# Raised when what is kept, or how it is packed or proven, changes.
_VERSION = 2

_LINEARS = ("qkv", "o", "gate_up", "down")
_NORMS = ("attention_norm", "mlp_norm", "query_norm", "key_norm")


@dataclass(frozen=True, slots=True)
class KeptModel:
    """A packed model from disk.

    Attributes:
        loaded: the model.
        weights: form of the weights inside the decoder, as ``quantize`` says.
        length: its context's when it was made.
        sample: its ``check.oracle_logits`` then.
    """

    loaded: LoadedModel
    weights: str
    length: int
    sample: torch.Tensor


def kept_file(folder: Path, weights: str, cache_dir: Path) -> Path:
    """Where the packed form of a model is kept.

    Args:
        folder: the model, a Hugging Face folder.
        weights: of the settings.
        cache_dir: of the settings.
    """
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
    return cache_dir / "packed" / f"{folder.name}-{place}-{weights}.safetensors"


def read_kept(
    file: Path, folder: Path, *, max_context: int | None = None, reach: int | None = None
) -> KeptModel | None:
    """The packed model, if there is one that is still good.

    Args:
        file: see ``kept_file``.
        folder: the model that it must have been made from.
        max_context: as in ``limits.context_length``.
        reach: as in ``limits.context_length``.

    Raises:
        RefusedError: the context asked for is not possible.
    """
    try:
        description, tensors = read(file)
        if stale := _difference(description, _made_from(folder)):
            raise BrokenFileError(stale)
        native.check()
        model = _model(description, tensors)
    except FileNotFoundError:
        return None
    except NativeError:
        return None  # why the operator can't be had, quantizing will say
    except BrokenFileError as error:
        log.warning("the packed weights in %s are made again: %s", file, error)
        return None
    except (LookupError, TypeError, ValueError) as error:
        log.warning("the packed weights in %s are made again: %s: %s", file, type(error).__name__, error)
        return None
    loaded = LoadedModel(
        model=model,
        layers=[LayerSpec(**layer) for layer in description["layers"]],
        architecture=description["architecture"],
        parameters=description["parameters"],
        vocabulary_size=model.head.out_features,
        context_length=context_length(model.config, max_context, reach=reach),
        dtype=torch.float32,
        mapped_bytes=file.stat().st_size,
    )
    return KeptModel(loaded, description["weights"], description["length"], tensors["sample"])


def keep(file: Path, folder: Path, kept: KeptModel) -> None:
    """Writes a packed model; where that is not possible, the log says so.

    Args:
        file: see ``kept_file``.
        folder: what it was made from.
        kept: its model is a ``QuantizedModel``.
    """
    loaded = kept.loaded
    parts, tensors = _parts(loaded.model)
    description = _made_from(folder) | {
        "weights": kept.weights,
        "length": kept.length,
        "architecture": loaded.architecture,
        "parameters": loaded.parameters,
        "layers": [asdict(layer) for layer in loaded.layers],
        "parts": parts,
    }
    try:
        write(file, description, {**tensors, "sample": kept.sample.contiguous()})
    except OSError as error:
        log.warning("the packed weights can't be kept, so that every start packs them again: %s", error)
    else:
        log.info("the packed weights are kept in %s", file)


def _made_from(folder: Path) -> dict[str, Any]:
    """What a packed model depends on."""
    files = [folder / "config.json", *weight_files(folder)]
    status = {file.name: file.stat() for file in files}
    return {
        "version": _VERSION,
        "versions": {name: version(name) for name in ("longspan", "torch", "transformers")},
        "files": {name: [each.st_size, each.st_mtime_ns] for name, each in status.items()},
    }


def _difference(description: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if description.get("files") != now["files"]:
        return "the model's files have changed since"
    if any(description.get(name) != now[name] for name in ("version", "versions")):
        return "they are of other versions of longspan, torch or transformers"
    return ""


def _parts(model: QuantizedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A model as numbers and names, and its tensors."""
    tensors = {"inv_freq": model.inv_freq, "norm": model.norm.weight}
    described = []
    for number, layer in enumerate(model.decoder.layers):
        assert isinstance(layer, QuantizedLayer)
        before, _, after, _ = layer.stages
        linears = {
            name: _describe(f"{number}.{name}", linear, tensors)
            for name, linear in zip(_LINEARS, layer.linears, strict=True)
        }
        for name, weight in zip(_NORMS, layer.norms, strict=False):
            tensors[f"{number}.{name}"] = weight
        described.append(
            {
                "index": layer.layer_idx,
                "heads": layer.heads,
                "features": layer.features,
                "epsilons": [before.epsilon, after.epsilon, before.head_epsilon],
                "linears": linears,
            }
        )
    head, embedding = model.head, model.embedding
    kind: dict[str, Any] = {"tied": False}
    if isinstance(embedding, QuantizedEmbedding):
        kind |= {"tied": embedding.codes is head.codes, "bits": embedding.bits}
        if not kind["tied"]:
            tensors |= {"embedding.codes": embedding.codes, "embedding.scales": embedding.scales}
    else:
        assert isinstance(embedding, nn.Embedding)
        tensors["embedding"] = embedding.weight
    return {
        "decoder": described,
        "head": _describe("head", head, tensors),
        "embedding": {**kind, "tokens": embedding.num_embeddings, "size": embedding.embedding_dim},
        "scaling": model.scaling,
        "epsilon": model.norm.epsilon,
        "config": vars(model.config),
    }, tensors


def _model(description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> QuantizedModel:
    parts, workspace = description["parts"], Workspace()
    layers = [
        QuantizedLayer(_Layer(each, number, tensors), workspace)
        for number, each in enumerate(parts["decoder"])
    ]
    head = _linear("head", parts["head"], tensors)
    about = parts["embedding"]
    if "embedding" in tensors:
        embedding: nn.Module = nn.Embedding.from_pretrained(tensors["embedding"])
    else:
        packed = Packed(head.bits, head.codes, head.scales, exact=True)
        if not about["tied"]:
            packed = Packed(
                about["bits"], tensors["embedding.codes"], tensors["embedding.scales"], exact=True
            )
        embedding = QuantizedEmbedding(packed, about["tokens"], about["size"])
    model = QuantizedModel(
        embedding=embedding,
        inv_freq=tensors["inv_freq"],
        scaling=parts["scaling"],
        decoder=QuantizedStack(layers),
        norm=_norm(tensors["norm"], parts["epsilon"]),
        head=head,
        config=Config(**parts["config"]),
    )
    return model.eval().requires_grad_(False)


class _Layer(FusedLayer):
    """A fused layer's parts, from what was kept of it."""

    def __init__(self, about: Mapping[str, Any], number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        nn.Module.__init__(self)
        self.layer_idx, self.features, self.plain = about["index"], about["features"], None
        self.query_heads, self.kv_heads, self.head_size = about["heads"]
        own = {name: tensors[f"{number}.{name}"] for name in _NORMS if f"{number}.{name}" in tensors}
        attention, mlp, head = about["epsilons"]
        epsilons = dict(zip(_NORMS, (attention, mlp, head, head), strict=True))
        norms = {name: _norm(weight, epsilons[name]) for name, weight in own.items()}
        self.attention_norm, self.mlp_norm = norms.pop("attention_norm"), norms.pop("mlp_norm")
        self.head_norms = nn.ModuleList(norms.values())
        self.activation = nn.SiLU()
        linears = about["linears"]
        self.qkv, self.o, self.gate_up, self.down = (
            _linear(f"{number}.{name}", linears[name], tensors) for name in _LINEARS
        )


def _describe(name: str, linear: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    assert isinstance(linear, QuantizedLinear)
    tensors |= {f"{name}.{part}": tensor for part, tensor in linear.named_buffers()}
    about = {"bits": linear.bits, "exact": linear.exact}
    return about | {"inputs": linear.in_features, "outputs": linear.out_features}


def _linear(name: str, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> QuantizedLinear:
    packed = Packed(about["bits"], tensors[f"{name}.codes"], tensors[f"{name}.scales"], about["exact"])
    return QuantizedLinear(packed, about["inputs"], about["outputs"], tensors.get(f"{name}.bias"))


def _norm(weight: torch.Tensor, epsilon: float) -> Norm:
    plain = nn.RMSNorm(len(weight), epsilon, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    return Norm(plain)
