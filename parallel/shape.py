"""The dimensions of a decoder: all that a layout needs to know of a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Counts that define the tensors of a decoder-only transformer.

    hidden_size: width of the residual stream. num_layers: decoder layers.
    num_query_heads, num_kv_heads: attention heads; each KV head serves num_query_heads / num_kv_heads query heads.
    head_dim: width of one head. ffn_size: columns of the gated feed-forward, or of each expert in a mixture of
    `num_experts`, of which a token passes `experts_per_token`; both are 0 where there is none. vocab_size: rows of
    embedding and head.
    """

    hidden_size: int
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    num_experts: int = 0
    experts_per_token: int = 0

    @property
    def queries_per_kv_head(self) -> int:
        return self.num_query_heads // self.num_kv_heads

    @property
    def layer_params(self) -> int:
        """Weights that one layer multiplies a token by: the measure by which stages are balanced."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_query_heads + self.num_kv_heads)
        router = self.hidden_size * self.num_experts
        return attention + router + 3 * self.hidden_size * self.ffn_size * (self.experts_per_token or 1)

    @property
    def head_params(self) -> int:
        """Weights of the language-model head, read once a step like a layer's."""
        return self.hidden_size * self.vocab_size
