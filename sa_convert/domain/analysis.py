"""What `analyze` finds out about a base model: the contents of analysis.json."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sa_convert.domain.frontier import Frontier
from sa_convert.domain.geometry import Head
from sa_convert.domain.plan import Plan, plain
from sa_convert.domain.report import BaseModel
from sa_convert.domain.rounding import digits
from sa_convert.domain.stacks import Stacks, in_stack
from sa_convert.domain.units import Unit

Matrix = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class AttentionStatistics:
    """How alike the attention probabilities of layers are; see `sa_convert.observe.similarity` for the definitions.

    similarity: (L, L), heads of the same index; None for layers of different numbers of heads, of different stacks, and
    without softmax attention. matched: (L, L), for each layer (row) its heads' best-matching heads in another (column).
    variance, isotropy: of each layer; isotropy is None if no other layer has as many heads. sequences: how many of
    text they are averages of.
    """

    similarity: Matrix
    matched: Matrix
    variance: tuple[float | None, ...]
    isotropy: tuple[float | None, ...]
    sequences: int

    def to_json(self) -> dict[str, Any]:
        return {
            "sequences": self.sequences,
            "similarity": [_rounded(row) for row in self.similarity],
            "matched_similarity": [_rounded(row) for row in self.matched],
            "variance": _rounded(self.variance),
            "isotropy": _rounded(self.isotropy),
        }


@dataclass(frozen=True)
class UnitCost:
    """What it costs that a unit alone is treated: in nats per token, or relative output error.

    sources: the heads that it then uses, one for each of its own. Both are None if it cannot be treated. offers: all
    that may be done to it: the treatment, the arguments of its first KV group, and the cost.
    """

    unit: Unit
    cost: float | None
    sources: tuple[Head, ...] | None
    offers: tuple[tuple[str, Any, float], ...] = ()

    def to_json(self, stacks: Stacks = ()) -> dict[str, Any]:
        """stacks: those of the model; layers are then numbered in each."""
        stack, layer = in_stack(stacks, self.unit.layer)
        sources = self.sources and [[in_stack(stacks, source).number, head] for source, head in self.sources]
        return {
            **({"stack": stack} if stacks else {}),
            "layer": layer,
            "groups": list(self.unit.groups),
            "heads": list(self.unit.heads),
            "cost": digits(self.cost),
            "sources": sources,
            **({"offers": [_offer_json(*offer) for offer in self.offers]} if self.offers else {}),
        }


@dataclass(frozen=True)
class CurvePoint:
    """A plan on the way of the search. key_cache_removed: 0 to 1. groups: KV groups without keys.

    estimated_loss: the sum of the costs of the cheapest units that remove as much, as measured before anything is
    removed; with "fisher" it estimates the divergence. The rest was measured of this plan on held-out sequences, in
    nats per token: the rise of the loss on text, the divergence KL(base || changed) there, and that on random
    repetition (None: no such sequence was held out).
    """

    key_cache_removed: float
    groups: int
    estimated_loss: float
    measured_loss: float
    measured_divergence: float
    repetition_divergence: float | None

    def to_json(self) -> dict[str, Any]:
        repetition = self.repetition_divergence
        return {
            "key_cache_removed": round(self.key_cache_removed, 6),
            "groups": self.groups,
            "estimated_loss": digits(self.estimated_loss),
            "measured_loss": digits(self.measured_loss),
            "measured_divergence": digits(self.measured_divergence),
            "measured_repetition_divergence": digits(repetition),
        }


@dataclass(frozen=True)
class CalibrationText:
    """text: its name. sequences, length: how many, of how many tokens. seed: of what is random."""

    text: str
    sequences: int
    length: int
    seed: int


@dataclass(frozen=True)
class Analysis:
    """All of analysis.json. measure: of the costs, "fisher" or "output error". dtype: in which the model was computed.

    heads: query heads of each layer. plan: that of recipe.yaml, which removes `key_cache_removed` (0 to 1); layers: as
    recipe.yaml has them. used_sources: (layer, source layer), and how many heads of the plan have their source there.
    peak_memory: bytes that the process had in use at most. caches: whether the model caches keys; if it does not,
    the key cache means the keys that are computed. frontier: of searches for bytes of the whole cache, or None.
    """

    base_model: BaseModel
    family: str
    calibration: CalibrationText
    dtype: str
    measure: str
    heads: tuple[int, ...]
    attention: AttentionStatistics
    costs: tuple[UnitCost, ...]
    curve: tuple[CurvePoint, ...]
    plan: Plan
    layers: Mapping[str, Any]
    used_sources: Mapping[tuple[int, int], int]
    key_cache_removed: float
    peak_memory: int
    versions: Mapping[str, str] = field(default_factory=dict)
    caches: bool = True
    frontier: Frontier | None = None

    @property
    def stacks(self) -> Stacks:
        """Those of the model, which name its layers."""
        return self.plan.stacks

    @property
    def treatments(self) -> tuple[str, ...]:
        """Those that any unit has an offer of."""
        return tuple(dict.fromkeys(name for cost in self.costs for name, _, _ in cost.offers))

    @property
    def keys_name(self) -> str:
        """What key_cache_removed is a part of."""
        return "key cache" if self.caches else "keys"

    @property
    def cost_unit(self) -> str:
        """The unit of costs and of estimated losses."""
        return "nats per token" if self.measure == "fisher" else "relative squared output error"

    @property
    def cost_matrix(self) -> Matrix:
        """(L, G): the cost of each KV group, None without a source; of a whole layer in its first column if only
        whole layers can be treated."""
        rows: list[list[float | None]] = [[] for _ in self.heads]
        for cost in self.costs:
            rows[cost.unit.layer].append(cost.cost)
        return tuple(tuple(row) for row in rows)

    @property
    def best_sources(self) -> Counter[tuple[int, int]]:
        """(layer, source layer) and for how many heads the best source is there."""
        pairs = ((cost.unit.layer, layer) for cost in self.costs for layer, _ in cost.sources or ())
        return Counter(pairs)

    def to_json(self) -> dict[str, Any]:
        """As in analysis.json. Floats are rounded to the digits that mean something."""
        return {
            "base_model": self.base_model.to_json(),
            "family": self.family,
            "calibration": asdict(self.calibration),
            "dtype": self.dtype,
            "measure": self.measure,
            "cost_unit": self.cost_unit,
            "layers": [self.plan.label(layer) for layer in range(len(self.heads))],
            "attention": self.attention.to_json(),
            "costs": [_rounded(row) for row in self.cost_matrix],
            "units": [cost.to_json(self.stacks) for cost in self.costs],
            "curve": [point.to_json() for point in self.curve],
            "frontier": self.frontier and self.frontier.to_json(),
            "recipe": {
                "key_cache_removed": round(self.key_cache_removed, 6),
                "layers": self.layers,
            },
            "peak_memory_bytes": self.peak_memory,
            "versions": dict(sorted(self.versions.items())),
        }


def _offer_json(treatment: str, arguments: Any, cost: float) -> dict[str, Any]:
    return {"treatment": treatment, "arguments": plain(arguments), "cost": digits(cost)}


def _rounded(row: tuple[float | None, ...]) -> list[float | None]:
    return [digits(value) for value in row]
