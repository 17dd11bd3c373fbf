"""What an engine is: text in, text out; and what it is asked for.

The one idea: a completion depends on the model, the prompt and the settings, and on nothing else that was asked beside it.
Sampling draws from numbers that belong to the prompt, so a prompt has the same sample in every batch and every order, up
to the rounding of the arithmetic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Finish = Literal["stop", "length", "too_long", "filtered", "unanswered"]


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """Up to `max_new_tokens`, the end-of-sequence token among them; greedy where `temperature` is 0, else sampled.

    `top_p`: only the most probable tokens that together have this mass are sampled from. `seed` is of the samples.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} is not positive")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} is not a number from 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not in (0, 1]")

    def seed_of(self, text: str) -> int:
        """The seed of one prompt's sample, below 2**31 (a server may read it as a signed number of 32 bits)."""
        drawn = hashlib.sha256(f"{self.seed}\0generate\0".encode() + text.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(drawn[:4], "big") >> 1


@dataclass(frozen=True, slots=True)
class Completion:
    """A response; `tokens` are those generated, without the end-of-sequence token (a server may count it in).

    `finish`: the model ended it (`stop`), or it was cut (`length`); or there is none, and `text` is empty: the prompt does
    not fit into the context (`too_long`), a server's filter kept it (`filtered`), or a server would not answer
    (`unanswered`, with its `reason`).
    """

    text: str
    tokens: int
    finish: Finish
    reason: str | None = None


class Engine(Protocol):
    """Text in, text out."""

    @property
    def context(self) -> int | None:
        """The most tokens that prompt and response may have together; None: no limit known."""
        ...

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each prompt as the model reads it, chat template included; only their order counts without a context."""
        ...

    def fits(self, rows: int, length: int, settings: GenerationSettings) -> bool:
        """Whether a batch of so many prompts of up to `length` tokens is within what the engine may hold."""
        ...

    def batch_cost(self, settings: GenerationSettings) -> int | None:
        """What one more batch costs, in tokens of a prompt's pass; None: batches are to be as large as they may be."""
        ...

    def complete(self, texts: Sequence[str], settings: GenerationSettings) -> list[Completion]:
        """One completion a prompt, in order; all of one batch."""
        ...
