"""A converted model that needs no code of ours: config.json alone tells a class of transformers what was done."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StockForm:
    """How such a model is written. engine: what it is written for, as recipes call it. config: its config.json.
    layers: the plan, as config.json has it in a model that carries code. options: what the engine has to be told on its
    command line, or ""."""

    engine: str
    config: Mapping[str, Any] = field(repr=False)
    layers: Mapping[str, Any] = field(repr=False)
    options: str = ""

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def architecture(self) -> str:
        return str(self.config["architectures"][0])

    def to_json(self) -> dict[str, Any]:
        """As in report.json, under "for"."""
        told = {"engine": self.engine, "model_type": self.model_type, "architecture": self.architecture}
        return told | ({"options": self.options} if self.options else {}) | {"layers": dict(self.layers)}
