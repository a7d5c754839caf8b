"""How a .gguf file scales positions: in metadata (`rope.scaling.*`) or by a tensor of factors (`rope_freqs.weight`).

llama.cpp divides the angle of each pair of numbers by its factor; transformers derives the factors from a few numbers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sa_convert.errors import UnsupportedModelError
from sa_convert.read.gguf_header import FOLDER, GgufHeader

FACTORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FACTORS, LONG, SHORT)

_SCALING = "rope.scaling."
_OLD_LINEAR = "rope.scale_linear"
_HARMLESS = ("finetuned",)  # tells how the model was trained, and changes nothing
_LOW, _HIGH = 1.0, 4.0  # of every Llama from 3.1 to 3.3
_ROUNDING = 5e-5
"""Relative. Both sides compute with float32 numbers, and the difference of two near ones is divided by the factor."""


def is_scaling(key: str) -> bool:
    """Whether a metadata key (without the architecture) is told about here."""
    return key.startswith(_SCALING) or key == _OLD_LINEAR


def scaled_positions(header: GgufHeader, theta: float, rotated: int, allowed: Sequence[str]) -> dict[str, Any]:
    """The scaling that the file asks for, as `rope_parameters` of transformers without `rope_theta`.

    theta: base of the frequencies. rotated: how many numbers of a head are rotated. allowed: the rope types that the
    model's config takes. Raises UnsupportedModelError for what transformers cannot compute.
    """
    told = _told(header)
    lists = LONG in header.tensors or SHORT in header.tensors
    found = _longrope(header, told, rotated) if lists else _from_metadata(header, told)
    if FACTORS in header.tensors:
        factors = header.numbers(FACTORS)
        by_tensor = _from_factors(header, factors, told, theta, rotated)
        if by_tensor["rope_type"] != "default":
            if found["rope_type"] != "default":
                raise _refused(header, f"scales positions both by '{FACTORS}' and by metadata ({found['rope_type']})")
            found = by_tensor
    if found["rope_type"] not in ("default", *allowed):
        where = next((name for name in TENSORS if name in header.tensors), f"{header.architecture}.{_SCALING}type")
        raise _refused(header, f"scales positions by {found['rope_type']} ('{where}')")
    return found


def _told(header: GgufHeader) -> dict[str, Any]:
    """The metadata on scaling, by what follows "rope.scaling."."""
    own = header.own()
    told = {key.removeprefix(_SCALING): own[key] for key in own if key.startswith(_SCALING)}
    if _OLD_LINEAR in own:
        told = {"type": "linear", "factor": own[_OLD_LINEAR]} | told
    for key, value in told.items():
        kind = {"type": str, "original_context_length": int, "finetuned": bool}.get(key, float)
        if not isinstance(value, kind) or (isinstance(value, float) and not math.isfinite(value)):
            raise _refused(header, f"has {value!r} under '{header.architecture}.{_SCALING}{key}'")
    return told


def _from_metadata(header: GgufHeader, told: Mapping[str, Any]) -> dict[str, Any]:
    kind = told.get("type", "none")
    if kind == "none":
        _refuse_others(header, told, ("type", "factor", "original_context_length"))
        if told.get("factor", 0.0) not in (0.0, 1.0):  # llama.cpp takes a factor without a type for linear
            kind = "linear" if "type" not in told else kind
    if kind == "none":
        return {"rope_type": "default"}
    factor = told.get("factor", 1.0)
    if factor <= 0:
        raise _refused(header, f"has {factor!r} under '{header.architecture}.{_SCALING}factor'")
    if kind == "linear":
        _refuse_others(header, told, ("type", "factor", "original_context_length"))
        return {"rope_type": "linear", "factor": factor} if factor != 1 else {"rope_type": "default"}
    if kind == "yarn":
        return _yarn(header, told, factor)
    raise _refused(header, f"scales positions by {kind!r} ('{header.architecture}.{_SCALING}type')")


def _yarn(header: GgufHeader, told: Mapping[str, Any], factor: float) -> dict[str, Any]:
    taken = ("type", "factor", "original_context_length", "attn_factor", "yarn_attn_factor", "yarn_ext_factor")
    _refuse_others(header, told, (*taken, "yarn_beta_fast", "yarn_beta_slow"))
    if told.get("yarn_ext_factor", 1.0) not in (1.0, -1.0):  # -1: as the type has it
        raise _refused(header, f"mixes YaRN in part ('{header.architecture}.{_SCALING}yarn_ext_factor')")
    trained = told.get("original_context_length") or header.own().get("context_length")
    if not isinstance(trained, int) or trained < 1:
        raise _refused(header, f"does not tell '{header.architecture}.{_SCALING}original_context_length'")
    found: dict[str, Any] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained}
    for side in ("beta_fast", "beta_slow"):
        if f"yarn_{side}" in told:
            found[side] = told[f"yarn_{side}"]
    strength = told.get("attn_factor", 1.0) * told.get("yarn_attn_factor", 1.0)
    if strength != 1:  # llama.cpp multiplies by what transformers takes when it is not told
        found["attention_factor"] = strength * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return found


def _longrope(header: GgufHeader, told: Mapping[str, Any], rotated: int) -> dict[str, Any]:
    """Two lists of factors: for texts within the context that the model was trained on first, and for longer ones."""
    if LONG not in header.tensors or SHORT not in header.tensors:
        raise _refused(header, f"has one of '{LONG}' and '{SHORT}' without the other")
    _refuse_others(header, told, ("type", "original_context_length", "attn_factor"))
    context = header.own().get("context_length")
    trained = told.get("original_context_length") or context
    if not isinstance(trained, int) or not isinstance(context, int) or trained < 2:
        raise _refused(header, f"does not tell '{header.architecture}.{_SCALING}original_context_length'")
    strength = told.get("attn_factor")
    if not strength:
        scale = context / trained
        strength = math.sqrt(1 + math.log(scale) / math.log(trained)) if scale > 1 else 1.0
    short, long = header.numbers(SHORT), header.numbers(LONG)
    if not len(short) == len(long) == rotated // 2:
        raise _refused(
            header,
            f"has {len(short)} factors in '{SHORT}' and {len(long)} in '{LONG}' for {rotated // 2} pairs of numbers",
        )
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": trained,
        "attention_factor": strength,
    }


def _from_factors(
    header: GgufHeader, factors: Sequence[float], told: Mapping[str, Any], theta: float, rotated: int
) -> dict[str, Any]:
    """The parameters that make these factors: none, one for all (linear), or those of Llama 3.1 (llama3)."""
    if len(factors) != rotated // 2 or not all(factor > 0 and math.isfinite(factor) for factor in factors):
        raise _refused(
            header, f"has {len(factors)} factors in '{FACTORS}', which are not those of {rotated // 2} pairs of numbers"
        )
    if all(_near(factor, factors[0]) for factor in factors):
        one = _near(factors[0], 1.0)
        return {"rope_type": "default"} if one else {"rope_type": "linear", "factor": factors[0]}
    waves = [2 * math.pi * theta ** (2 * pair / rotated) for pair in range(rotated // 2)]
    largest = _rounded(max(factors))
    for low, high, trained in _guesses(factors, waves, largest, told.get("original_context_length")):
        made = llama3_factors(waves, largest, low, high, trained)
        if all(_near(factor, expected) for factor, expected in zip(factors, made, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": largest,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": trained,
            }
    raise _refused(header, f"has factors in '{FACTORS}' that are neither one for all nor those of Llama 3.1 to 3.3")


def llama3_factors(waves: Sequence[float], factor: float, low: float, high: float, trained: int) -> list[float]:
    """What Llama 3.1 divides the angles of each wave length by, which is counted in tokens.

    Waves shorter than trained / high stay, those longer than trained / low are divided by the factor, and those between
    move from one to the other.
    """
    made = []
    for wave in waves:
        kept = min(max((trained / wave - low) / (high - low), 0.0), 1.0)
        made.append(1 / ((1 - kept) / factor + kept))
    return made


def _guesses(
    factors: Sequence[float], waves: Sequence[float], factor: float, told: int | None
) -> list[tuple[float, float, int]]:
    """Low and high factors, and contexts, that may have made the factors, those of the published models first.

    Of the three numbers, two can be told if two waves lie between, and one if one does. The rest is free then: whatever
    makes the factors that the model has will do.
    """
    between = [
        (1 / wave, (1 / made - 1 / factor) / (1 - 1 / factor))
        for wave, made in zip(waves, factors, strict=True)
        if 1 + _ROUNDING < made < factor * (1 - _ROUNDING)
    ]
    guesses: list[tuple[float, float, int]] = []
    if len(between) >= 2:  # kept = trained / (high - low) / wave - low / (high - low): a straight line
        (first, kept_first), (last, kept_last) = between[0], between[-1]
        slope = (kept_first - kept_last) / (first - last)
        offset = slope * first - kept_first
        if slope > 0 and offset > 0:
            span = told / slope if told else _LOW / offset
            low, trained = offset * span, told or round(slope * span)
            guesses.append((_rounded(low), _rounded(low + span), trained))
            guesses.append((low, low + span, trained))
    contexts = [told] if told else [2**power for power in range(4, 21)]
    wave_kept = [(1 / inverse, kept) for inverse, kept in between[:1] if 0 < kept < 1]
    highs = [(1 + (trained / wave - 1) / kept, trained) for wave, kept in wave_kept for trained in contexts]
    return [
        *((_LOW, _HIGH, trained) for trained in contexts),
        *guesses,
        *((_LOW, high, trained) for high, trained in highs if high > _LOW),
    ]


def _rounded(value: float) -> float:
    """The short number that a value stands for, such as 8.0 for 8.0000003."""
    short = float(f"{value:.4g}")
    return short if _near(value, short) else value


def _near(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=_ROUNDING)


def _refuse_others(header: GgufHeader, told: Mapping[str, Any], taken: Sequence[str]) -> None:
    neutral = {"attn_factor": (1.0,), "yarn_log_multiplier": (0.0,), "yarn_attn_factor": (1.0,), "alpha": (0.0, 1.0)}
    for key, value in told.items():
        if key not in taken and key not in _HARMLESS and value not in neutral.get(key, ()):
            raise _refused(header, f"has {value!r} under '{header.architecture}.{_SCALING}{key}'")


def _refused(header: GgufHeader, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{header.file}: {what}, which transformers cannot compute in a model of this type; {FOLDER}."
    )
