"""How far two models say the same."""

from dataclasses import dataclass
from typing import Any

from sa_convert.domain.rounding import digits


@dataclass(frozen=True)
class Agreement:
    """How far a model says the same as a reference. kl: mean of KL(reference || model), in nats per token.

    top1: the part of the positions, 0 to 1, where both hold the same token most likely. tokens: positions compared.
    """

    kl: float
    top1: float
    tokens: int

    def to_json(self) -> dict[str, Any]:
        return {"kl": digits(self.kl), "top1_agreement": digits(self.top1), "tokens": self.tokens}
