"""What running a result beside its source shows, as values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Comparison:
    """Over `num_tokens` tokens of a text.

    kl: mean over tokens of the Kullback-Leibler divergence of the result's next-token distribution from the source's,
    in nats. top1: share of tokens where both find the same token most likely. perplexity: exp of the mean loss of the
    next token. cosine: of embeddings (the mean of the last hidden states of a window), the mean over windows, where the
    model predicts no next token. None: not known, for want of a source or of a head.
    """

    location: str
    source: str | None
    num_tokens: int
    kl: float | None = None
    top1: float | None = None
    perplexity: float | None = None
    source_perplexity: float | None = None
    cosine: float | None = None
    worst_cosine: float | None = None
    max_kl: float | None = None

    @property
    def distance(self) -> float | None:
        """What `max_kl` bounds: the divergence, or of embeddings 1 - cosine at worst."""
        return self.kl if self.worst_cosine is None else 1 - self.worst_cosine

    @property
    def is_ok(self) -> bool:
        return self.max_kl is None or self.distance is None or self.distance <= self.max_kl

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"ok": self.is_ok}
