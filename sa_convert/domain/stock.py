"""A converted model that an engine runs by a class of its own: config.json alone tells it what was done."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StockForm:
    """How such a model is written. engine: what it is written for, as recipes call it. config: its config.json.
    layers: the plan, as config.json has it in a model that carries code. options: what the engine has to be told on its
    command line, or "".

    modules: empty, if transformers has the class, too. Else the folder carries code for transformers, and the plan is
    in config.json: `config` has what comes there besides (of architectures, those that come after ours), and `modules`
    what the code has to be told.
    """

    engine: str
    config: Mapping[str, Any] = field(repr=False)
    layers: Mapping[str, Any] = field(repr=False)
    options: str = ""
    modules: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_code(self) -> bool:
        return bool(self.modules)

    @property
    def model_type(self) -> str:
        """Of a model without code."""
        return str(self.config["model_type"])

    @property
    def architecture(self) -> str:
        """The engine's class."""
        return str(self.config["architectures"][0])

    @property
    def summary(self) -> str:
        """For people."""
        code = "with code for transformers" if self.has_code else "without code"
        return f"{self.engine}, {code}: {self.architecture}"

    def to_json(self) -> dict[str, Any]:
        """As in report.json, under "for"."""
        kind = {} if self.has_code else {"model_type": self.model_type}
        told = {"engine": self.engine, **kind, "architecture": self.architecture}
        plan = {} if self.has_code else {"layers": dict(self.layers)}
        return told | ({"options": self.options} if self.options else {}) | plan


def without_code(stock: StockForm | None) -> StockForm | None:
    """The form of a model whose folder carries no code. None: it does, as all that are written for transformers."""
    return None if stock is None or stock.has_code else stock
