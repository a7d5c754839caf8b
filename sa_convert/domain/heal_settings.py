"""How a converted model is healed: what `heal:` in a recipe and the options of `sa-convert heal` say.

Importing this module loads pydantic; commands import it inside their bodies.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, StrictBool, StrictInt, StrictStr

from sa_convert.domain.recipe_map import RecipeValueError

Trained = Literal["outputs", "layers", "model", "lora"]
"""What trains: values and outputs of changed layers, all of these layers, all layers of the model, or low-rank
additions to those that changed."""

TOKENS = 400_000
"""If neither tokens nor minutes are given."""

RATES: dict[Trained, float] = {"outputs": 5e-4, "layers": 1e-4, "model": 1e-4, "lora": 1e-3}
"""Peak learning rates. Three times that of `layers` ruined copying (EVIDENCE: 3e-4 is too much)."""

WINDOWED_RATE = 1e-4
"""Of `outputs`, if the plan has windows. What they cost is little, and at 2e-4 the divergence of text grows."""

LENGTH, LONG = 512, 2048
"""Tokens of a sequence; the second if the plan has windows, which short sequences hardly test."""

SHORTEST = 16

REPEATED = 4
"""One row in so many is random repetition."""


BOTH = "builtin+written"
"""Built-in text and text by the base: the first is narrow, and is read many times before a budget is used up."""


def _known_text(text: str) -> str:
    hub = text.startswith("hub:") and 1 <= len(text.split(":")) - 1 <= 3 and all(text.split(":"))
    if text not in ("builtin", "written", BOTH) and not hub and not text.endswith((".txt", ".md", ".jsonl")):
        raise ValueError(
            f"{text!r} is not builtin, written, {BOTH}, a .txt, .md or .jsonl file, or hub:DATASET[:CONFIG[:SPLIT]]"
        )
    return text


def _count(value: object) -> object:
    """A whole number from 1 on; 400k and 2M are texts of one."""
    if isinstance(value, str) and value[:-1].isdigit() and value[-1] in "kM":
        value = int(value[:-1]) * (1000 if value[-1] == "k" else 1_000_000)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{value!r} is no whole number from 1 on, such as 400000, 400k or 2M")
    return value


def _amount(value: object) -> object:
    """A number above 0; YAML 1.2 has 1e-3 as a text."""
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else -1.0
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise ValueError(f"{value!r} is no number above 0")
    return number


Count = Annotated[int, BeforeValidator(_count)]
Amount = Annotated[float, BeforeValidator(_amount)]


def _long_enough(length: int) -> int:
    if length < SHORTEST:
        raise ValueError(f"sequences of {length} tokens teach nothing; write {SHORTEST} or more")
    return length


class HealSettings(BaseModel):
    """Budget, text and training of a healing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: Count | None = None
    """Tokens that are trained on. None: TOKENS, or as many as `minutes` allow."""
    minutes: Amount | None = None
    """Of training, the judge included. With `tokens`: whatever ends first."""
    text: Annotated[StrictStr, AfterValidator(_known_text)] | None = None
    """As in `sa_convert.texts.text.load_text`, "written": by the base itself, or BOTH. None: the text of the
    calibration, or BOTH if that is "builtin"."""
    train: Trained = "outputs"
    length: Annotated[Count, AfterValidator(_long_enough)] | None = None
    """Tokens of a sequence. None: LENGTH, or LONG if the plan has windows, and never more than the model has."""
    rows: Count | None = None
    """Sequences of one step, on all processes together. None: one on each. The answers of a teacher have little noise,
    so many small steps heal more than few large ones."""
    rate: Amount | None = None
    """Peak learning rate. None: that of RATES, or WINDOWED_RATE."""
    rank: Count = 16
    """Of `lora`."""
    seed: StrictInt = 0
    gradient_checkpointing: StrictBool = False
    """Less memory for more time."""

    @property
    def budget(self) -> int | None:
        """Tokens to train on; None: only time ends it."""
        return self.tokens if self.tokens is not None or self.minutes is not None else TOKENS

    @property
    def peak_rate(self) -> float:
        """Once `resolved`."""
        return self.rate if self.rate is not None else RATES[self.train]

    @property
    def step_rows(self) -> int:
        """Sequences of one step, once `resolved`."""
        return self.rows or 1

    def resolved(self, text: str, windows: bool, positions: int | None, processes: int = 1) -> "HealSettings":
        """With everything spelled out that the plan, the model and the launch decide.

        text: of the calibration. processes: that train. Raises RecipeValueError for a length that the model has no
        positions for.
        """
        wanted = self.length or (LONG if windows else LENGTH)
        if self.length is not None and positions is not None and self.length > positions:
            raise RecipeValueError(f"{self.length} is more than the {positions} positions of the model", "length")
        update = {
            "text": self.text or (BOTH if text == "builtin" else text),
            "tokens": self.budget,
            "rate": WINDOWED_RATE if windows and self.rate is None and self.train == "outputs" else self.peak_rate,
            "length": min(wanted, positions or wanted),
            "rows": self.rows or processes,
        }
        return self.model_copy(update=update)
