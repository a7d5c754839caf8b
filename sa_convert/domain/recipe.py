"""A recipe: what to do to a model, and how good the result must be. Frozen data, validated by pydantic.

The messages of the validators complete a line such as "recipe.yaml, line 7: ..." (`sa_convert.plan.recipe_file`).
Importing this module loads pydantic; commands import it inside their bodies.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    PrivateAttr,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)

from sa_convert.console.amounts import format_percent, parse_percent
from sa_convert.domain.heal_settings import HealSettings
from sa_convert.domain.layer_range import LayerRange
from sa_convert.domain.recipe_map import HeadSource, RecipeValueError, parse_map, parse_plan


@dataclass(frozen=True)
class Origin:
    """Where a recipe was written, for messages. It does not take part in comparisons of recipes.

    file: as the user named it, or None. lines: line number (from 1) of each key and list item, by its path.
    """

    file: str | None = field(default=None, compare=False)
    lines: Mapping[tuple[str | int, ...], int] = field(default_factory=dict, compare=False, repr=False)

    def at(self, *path: str | int) -> str:
        """Such as "recipe.yaml, line 7", for a path such as "sharing", "spans", 0."""
        if self.file is None:
            return "recipe"
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.file}, line {self.lines.get(path, 1)}"


def _more_than_none(fraction: float) -> float:
    if fraction == 0:
        raise ValueError("0% leaves nothing to do; write more than 0%")
    return fraction


def _less_than_all(fraction: float) -> float:
    if fraction == 1:
        raise ValueError("100% is impossible, since something has to stay; write less than 100%")
    return fraction


Percent = Annotated[float, BeforeValidator(parse_percent), PlainSerializer(format_percent)]
Layers = Annotated[
    InstanceOf[LayerRange],
    BeforeValidator(LayerRange.parse),
    PlainSerializer(lambda layers: int(str(layers)) if str(layers).isdigit() else str(layers)),
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Span(_Frozen):
    """Consecutive layers that borrow from one. source: its number; None: the nearest layer before that can serve."""

    layers: Layers
    source: Annotated[StrictInt, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _has_a_source(self) -> "Span":
        if self.layers.by_depth:
            return self
        if self.layers.first == 0:
            raise RecipeValueError("layer 0 cannot borrow, since no layer is before it; start at 1 or later", "layers")
        if self.source is not None and self.source >= self.layers.first:
            raise RecipeValueError(
                f"source {self.source} is not before layers {self.layers}; name an earlier layer", "source"
            )
        return self


class CacheSearch(_Frozen):
    """What a search over all treatments aims at: a part of the whole cache of a sequence of `at` tokens, or all that a
    limit on the perplexity allows. One of the two is None."""

    cache: Annotated[Percent, AfterValidator(_less_than_all), AfterValidator(_more_than_none)] | None = None
    max_perplexity_increase: Annotated[Percent, AfterValidator(_more_than_none)] | None = None
    at: Annotated[StrictInt, Field(ge=1)]

    @model_validator(mode="after")
    def _one_aim(self) -> "CacheSearch":
        _exactly_one(self, "search", ("cache", "max_perplexity_increase"))
        return self


class Search(_Frozen):
    """What a search aims at: a part of the key cache, or all that a limit on the perplexity allows. One is None."""

    key_cache: Annotated[Percent, AfterValidator(_less_than_all), AfterValidator(_more_than_none)] | None = None
    max_perplexity_increase: Annotated[Percent, AfterValidator(_more_than_none)] | None = None

    @model_validator(mode="after")
    def _one_aim(self) -> "Search":
        _exactly_one(self, "search", ("key_cache", "max_perplexity_increase"))
        return self


class Sharing(_Frozen):
    """How heads and their sources are chosen. Exactly one of the three is not None."""

    spans: Annotated[tuple[Span, ...], Field(min_length=1)] | None = None
    map: dict[int | str, tuple[HeadSource | None, ...]] | None = None
    search: Search | None = None

    @field_validator("map", mode="before")
    @classmethod
    def _parse_map(cls, value: object) -> object:
        return None if value is None else parse_map(value)

    @model_validator(mode="after")
    def _one_way(self) -> "Sharing":
        _exactly_one(self, "sharing", ("spans", "map", "search"))
        return self


class Calibration(_Frozen):
    """Text for search and refit: "builtin", a .txt/.md/.jsonl file or "hub:DATASET[:CONFIG[:SPLIT]]"."""

    text: StrictStr = "builtin"
    sequences: Annotated[StrictInt, Field(ge=1)] = 32
    length: Annotated[StrictInt, Field(ge=2)] = 512

    @field_validator("text")
    @classmethod
    def _known_kind(cls, text: str) -> str:
        hub = text.startswith("hub:") and 1 <= len(text.split(":")) - 1 <= 3 and all(text.split(":"))
        if text != "builtin" and not hub and not text.endswith((".txt", ".md", ".jsonl")):
            raise ValueError(f"{text!r} is not builtin, a .txt, .md or .jsonl file, or hub:DATASET[:CONFIG[:SPLIT]]")
        return text


class Gate(_Frozen):
    """How much worse the result may be.

    max_perplexity_increase: a fraction (0.05 is 5%), of short and of long text. max_copying_increase: in nats a token,
    at every distance that is measured; None: no limit. at: tokens of the sequence that the result is for; None: those
    that the search names.
    """

    max_perplexity_increase: Percent = 0.05
    max_copying_increase: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] | None = None
    at: Annotated[StrictInt, Field(ge=1)] | None = None


def _none(value: object) -> object:
    return None if value == "none" else value


class Recipe(_Frozen):
    """A whole recipe. `origin` tells where it was written. engine: the key `for`, what the result is to run in."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    description: StrictStr = ""
    search: CacheSearch | None = None
    sharing: Sharing | None = None
    plan: dict[int | str, dict[int, dict[str, Any]] | dict[str, Any] | str] | None = None
    treatments: Annotated[tuple[StrictStr, ...], Field(min_length=1)] | None = None
    refit: Literal["none", "ridge"] = "none"
    heal: Annotated[HealSettings | None, BeforeValidator(_none)] = None
    calibration: Calibration = Calibration()
    gate: Gate = Gate()
    engine: Annotated[Literal["transformers", "vllm"], Field(alias="for")] = "transformers"
    _origin: Origin = PrivateAttr(default_factory=Origin)

    @field_validator("plan", mode="before")
    @classmethod
    def _parse_plan(cls, value: object) -> object:
        return None if value is None else parse_plan(value)

    @model_validator(mode="after")
    def _one_substance(self) -> "Recipe":
        if self.search is None and self.sharing is None and self.plan is None:
            raise RecipeValueError("the key 'search' is missing; or give a 'plan', or 'sharing'")
        _exactly_one(self, "a recipe", ("search", "sharing", "plan"))
        return self

    @property
    def origin(self) -> Origin:
        return self._origin

    @property
    def searches(self) -> Search | CacheSearch | None:
        """What it leaves to a search; None: it says everything itself."""
        return self.sharing.search if self.sharing else self.search

    def written_at(self, origin: Origin) -> "Recipe":
        """The same recipe, with another origin."""
        copy = self.model_copy()
        copy._origin = origin
        return copy

    @property
    def needs(self) -> frozenset[str]:
        """What it asks for beyond what is spelled out: "search", "ridge refit"."""
        return frozenset(["search"] if self.searches else []) | frozenset(
            ["ridge refit"] if self.refit == "ridge" else []
        )

    def with_heal(self, settings: HealSettings) -> "Recipe":
        """The same recipe with a healing."""
        return self.model_copy(update={"heal": settings})

    def with_engine(self, engine: str) -> "Recipe":
        """The same recipe for another engine."""
        return self.model_copy(update={"engine": engine})

    def with_gate(self, max_perplexity_increase: float) -> "Recipe":
        """The same recipe with another limit of the perplexity, a fraction (0.05 is 5%)."""
        gate = self.gate.model_copy(update={"max_perplexity_increase": max_perplexity_increase})
        return self.model_copy(update={"gate": gate})

    @property
    def at(self) -> int | None:
        """Tokens of the sequence that the result is for, or None if it does not say."""
        return self.gate.at or (self.search.at if self.search else None)

    def with_text(self, text: str) -> "Recipe":
        """The same recipe with other text to calibrate on."""
        calibration = self.calibration.model_copy(update={"text": text})
        return self.model_copy(update={"calibration": calibration})

    def resolved(self, substance: Mapping[str, Any]) -> "Recipe":
        """The same recipe with what came of it. substance: the one of its keys `sharing` and `plan` that says it."""
        gate = self.gate.model_copy(update={"at": self.at})  # which goes with the search
        gone = {"search": None, "sharing": None, "plan": None, "treatments": None}
        return self.model_copy(update={**gone, "gate": gate, **substance})


def _exactly_one(model: BaseModel, name: str, keys: tuple[str, ...]) -> None:
    given = [key for key in keys if getattr(model, key) is not None]
    if len(given) != 1:
        but = f"but has {' and '.join(given)}" if given else "but has none of them"
        raise RecipeValueError(f"{name} needs exactly one of {', '.join(keys)}, {but}")
