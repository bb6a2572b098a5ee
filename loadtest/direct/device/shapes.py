"""A Llama's shape: how many weights it has, which bytes a decode step reads, which sums a prefill takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama with a head of its own (embeddings not tied) and no biases.

    Attributes:
        vocabulary: number of logits.
        hidden: numbers of a token between layers.
        intermediate: inside the gated MLP.
        layers: decoder layers.
        query_heads: of each layer.
        kv_heads: of each layer.
        head_size: of queries, keys and values.
        positions: the longest context.
        trained_positions: the context from which llama3 scaling stretches the rotary embedding.
    """

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    query_heads: int
    kv_heads: int
    head_size: int
    positions: int
    trained_positions: int

    @property
    def config(self) -> dict[str, Any]:
        """The same as values of ``transformers.LlamaConfig``."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "max_position_embeddings": self.positions,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": self.trained_positions,
            },
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }

    @property
    def layer_weights(self) -> int:
        """Weights in the matrices of one layer: queries, keys, values and output; gate, up and down."""
        heads = 2 * self.query_heads + 2 * self.kv_heads
        return self.hidden * (heads * self.head_size + 3 * self.intermediate)

    @property
    def parameters(self) -> int:
        """All weights: layers, two norms in each and one behind them, embedding and head."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.layers * self.layer_weights + norms + 2 * self.vocabulary * self.hidden

    def kv_bytes(self, number_bytes: float) -> float:
        """Bytes of one token's keys and values in all layers, with so many bytes to a number."""
        return 2 * self.layers * self.kv_heads * self.head_size * number_bytes

    def decode_bytes(self, context: float, streams: int, weight_bytes: float, kv_token_bytes: float) -> float:
        """Bytes that one decode step has to read at least.

        Every weight once for any number of streams, but of the embedding only one row for each; and of
        each stream the keys and values of ``context`` tokens. Writes (one token's keys and values for
        each stream) and data that stays inside the chip (activations, logits) are left out: they make up
        less than a thousandth at one stream.

        Args:
            context: tokens that each stream attends to, its newest included.
            streams: sequences that get a token.
            weight_bytes: of one weight.
            kv_token_bytes: of one token's keys and values in all layers, see ``kv_bytes``.
        """
        weights = self.parameters - (self.vocabulary - streams) * self.hidden
        return weights * weight_bytes + streams * context * kv_token_bytes

    def prefill_flops(self, context: int, tokens: int) -> int:
        """Additions and multiplications of a prefill's matrix products.

        Two for each token and weight of the layers' matrices; two for each weight of the head, once, since
        only the last token's logits are needed; and for each query head and each pair of a token and one that
        it sees (those before it and itself), two products of ``head_size`` numbers: with the key and with the
        value. Norms, rotations and softmax are left out.

        Args:
            context: tokens in the cache before.
            tokens: computed now.
        """
        linears = 2 * tokens * self.layers * self.layer_weights + 2 * self.vocabulary * self.hidden
        pairs = tokens * context + tokens * (tokens + 1) // 2
        return linears + 4 * self.layers * self.query_heads * self.head_size * pairs


LLAMA_8B = Shape(
    vocabulary=128_256,
    hidden=4096,
    intermediate=14_336,
    layers=32,
    query_heads=32,
    kv_heads=8,
    head_size=128,
    positions=131_072,
    trained_positions=8192,
)

TINY = Shape(
    vocabulary=512,
    hidden=128,
    intermediate=256,
    layers=3,
    query_heads=4,
    kv_heads=2,
    head_size=32,
    positions=1024,
    trained_positions=128,
)
