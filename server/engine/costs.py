"""Lower bounds of a step's cost: bytes moved to and from the device's memory, and arithmetic.

The two figures that, divided by the step's time and by the device's rates, place it under the roofline
(Williams, Waterman, Patterson: "Roofline", CACM 52(4), 2009). They are lower bounds from shapes, not counts
of what a kernel did: every weight that the step needs is read once, every page of the KV cache that a query
may see is read once per layer, and activations move nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from attention.cache import PagedCache
from attention.reading import LayerReads
from attention.types import LayerSpec
from server.models.encoders.prepacked import PrepackedLinear
from server.models.quantized.embedding import QuantizedEmbedding
from server.models.quantized.linear import QuantizedLinear
from server.models.weight_only import tensors_of

# Names in transformers' configs: of the number of experts, and of those that a token is routed to.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_CHOSEN = (
    *("num_experts_per_tok", "num_experts_per_token", "top_k_experts"),
    *("moe_topk", "moe_top_k", "moe_k"),
)


class Cost(NamedTuple):
    """The cost of one step.

    Attributes:
        bytes: moved at least.
        flops: a multiplication and an addition are two, in whatever dtype.
    """

    bytes: int
    flops: int


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a model's weights.

    Attributes:
        bytes: that they take, in the form in which they are kept.
        products: multiply-adds for one row.
    """

    bytes: int = 0
    products: int = 0

    def __add__(self, other: Part) -> Part:
        return Part(self.bytes + other.bytes, self.products + other.products)


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """A model's weights by how a forward uses them.

    Attributes:
        body: used by every token: norms, biases, linear layers outside of head and experts.
        experts: of the layers that tokens are routed among, all of them.
        active: the share of these that one token uses.
        head: the output layer, used by every row whose logits are asked for.
        row_bytes: what a token reads of embedding tables.
        stored: bytes of all of them, embedding tables included.
    """

    body: Part
    experts: Part
    active: float
    head: Part
    row_bytes: int
    stored: int

    @classmethod
    def of(cls, model: Any) -> ModelWeights:
        """The weights of a causal language model of transformers, which may be fused or packed.

        Of an encoder-decoder's encoder only the bytes stored count: most steps encode no source.

        Where the config does not say the number of experts, all of them count for every token.
        """
        output = model.get_output_embeddings()
        encodes = getattr(model.config, "is_encoder_decoder", False)
        encoder = set(model.get_encoder().modules()) if encodes else ()
        body, experts, head = Part(), Part(), Part()
        row_bytes = stored = 0
        seen: set[int] = set()
        for name, module in model.named_modules():
            packed = isinstance(module, QuantizedLinear | QuantizedEmbedding)
            own: list[torch.Tensor] = list(module.buffers() if packed else module.parameters(recurse=False))
            # A table of embeddings is often the output layer's too.
            stored += sum(_bytes(tensor) for tensor in own if id(tensor) not in seen)
            seen |= {id(tensor) for tensor in own}
            size = sum(map(_bytes, own))
            if isinstance(module, QuantizedLinear):
                part = Part(size, module.in_features * module.out_features)
            else:
                part = Part(size, sum(tensor.numel() for tensor in own if tensor.ndim > 1))
            if isinstance(module, PrepackedLinear):
                part += Part(module.packed_bytes, module.in_features * module.out_features)
                stored += module.packed_bytes
            if module in encoder:
                continue
            if isinstance(module, QuantizedEmbedding):
                row_bytes += module.row_bytes
            elif isinstance(module, nn.Embedding):
                row_bytes += module.embedding_dim * module.weight.itemsize
            elif module is output:
                head += part
            elif "experts" in name.split("."):
                experts += part
            else:
                body += part
        return cls(body, experts, _active(model.config), head, row_bytes, stored)

    def cost(self, tokens: int, rows: int) -> Cost:
        """The cost of a forward over ``tokens`` tokens that gives the logits of ``rows`` of them.

        Routing is taken to be independent and even for each token, so that the share
        ``1 - (1 - active) ** tokens`` of the experts is read. Routers that prefer some experts read fewer.
        The arithmetic does not depend on it.

        Example:
            A body of 100 million bytes and 100 million products, a head of 10 and 10, rows of 1,000 bytes:
            one token with its logits costs 110,001,000 bytes and 220 million flops; 512 tokens with the last
            one's logits cost 110,512,000 bytes and 2 * (512 * 100 + 10) million = 102.42 billion flops.
        """
        needed = 1 - (1 - self.active) ** tokens
        moved = self.body.bytes + self.head.bytes + tokens * self.row_bytes + needed * self.experts.bytes
        products = tokens * (self.body.products + self.active * self.experts.products)
        return Cost(round(moved), 2 * round(products + rows * self.head.products))


def _bytes(weight: torch.Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(weight))


class _Layers(NamedTuple):
    """The sums over some attention layers.

    Attributes:
        page: bytes of a page's keys and values.
        summary: bytes of a page's summary.
        products: multiply-adds of a query with a key.
    """

    page: int
    summary: int
    products: int


class StepCosts:
    """The costs of a model's steps over a paged cache.

    Args:
        model: a causal language model of transformers.
        layers: its attention layers.
        cache: their keys and values.
    """

    def __init__(self, model: Any, layers: Iterable[LayerSpec], cache: PagedCache) -> None:
        self.weights = ModelWeights.of(model)
        self._layers: dict[tuple[int, ...], _Layers] = {}
        self._by_index: dict[int, _Layers] = {}
        for layer in layers:
            kept = cache.layers[layer.index]._asdict()
            sizes = {name: tensor[0].nbytes for name, tensor in kept.items() if tensor is not None}
            summary, page = sizes.pop("summary", 0), sum(sizes.values())
            products = layer.query_heads * (layer.head_size + layer.value_size)
            self._by_index[layer.index] = _Layers(page, summary, products)
        self._token = sum(layer.page for layer in self._by_index.values()) // cache.page_size

    @property
    def reach(self) -> float | None:
        """Earlier tokens for which attention takes as many multiply-adds as a token's weights.

        ``None`` for a model without attention layers.
        """
        weights, pair = self.weights, sum(layer.products for layer in self._by_index.values())
        return (weights.body.products + weights.active * weights.experts.products) / pair if pair else None

    def of(self, tokens: int, rows: int, reads: tuple[LayerReads, ...]) -> Cost:
        """The cost of one step.

        Weights as in ``ModelWeights.cost``. Attention reads the pages that its queries may see, and the
        summaries by which it selects; it writes the keys and values of the step's tokens. A query with a key
        takes ``head_size`` multiply-adds in each query head, and ``value_size`` more for the key's value.

        Args:
            tokens: computed.
            rows: whose logits were computed.
            reads: what attention read.

        Example:
            2 layers of 4 query heads over 2 KV heads of size 16 in float32, pages of 16 tokens: a page takes
            16 * 2 * (16 + 16) * 4 = 4,096 bytes in a layer. One token after 32 others reads 3 pages per layer
            and writes one token's part of a page: 2 * (3 * 4,096 + 256) = 25,088 bytes. It sees 33 keys,
            which is 33 * 4 * (16 + 16) = 4,224 multiply-adds in a layer: 16,896 flops.
        """
        cost = self.weights.cost(tokens, rows)
        moved, products = cost.bytes + tokens * self._token, 0
        for read in reads:
            layers = self._summed(read.layers)
            moved += read.pages * layers.page + read.summaries * layers.summary
            products += read.pairs * layers.products
        return Cost(moved, cost.flops + 2 * products)

    def _summed(self, indices: tuple[int, ...]) -> _Layers:
        found = self._layers.get(indices)
        if found is None:
            figures = zip(*(self._by_index[index] for index in indices), strict=True)
            found = self._layers[indices] = _Layers(*map(sum, figures))
        return found


def _active(config: Any) -> float:
    text = config.get_text_config(decoder=True)
    counts = [
        next((value for name in names if isinstance(value := getattr(text, name, None), int)), None)
        for names in (_CHOSEN, _EXPERTS)
    ]
    if counts[0] is None or not counts[1]:
        return 1.0
    return min(1.0, counts[0] / counts[1])
