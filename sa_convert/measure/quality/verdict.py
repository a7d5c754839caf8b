"""What the gate says of a validation: by how much the converted model is worse than the limits, and what to try."""

import math
from collections.abc import Iterator
from dataclasses import replace

from sa_convert.console.amounts import format_percent, with_error
from sa_convert.domain.losses import Mean
from sa_convert.domain.report import GateResult, Validation
from sa_convert.errors import GateRefused


def judged(
    validation: Validation, max_perplexity_increase: float | None, max_copying_increase: float | None = None
) -> Validation:
    """The same with the verdict; without a limit of the perplexity there is none. max_copying_increase: None: no
    limit."""
    if max_perplexity_increase is None:
        return validation
    gate = GateResult(max_perplexity_increase, True, max_copying_increase)
    check = validation.decode_check
    passed = (check is None or check.passed) and not any(_beyond(validation, gate))
    return replace(validation, gate=replace(gate, passed=passed))


def refuse_if_failed(validation: Validation) -> None:
    """Raises GateRefused if the converted model decodes wrongly, or is worse than the gate allows."""
    check = validation.decode_check
    if check is not None and not check.passed:
        problem = (
            f"logits differ by {check.max_abs_logit_difference:.2g} (tolerance {check.tolerance:.2g})"
            if not check.max_abs_logit_difference <= check.tolerance
            else "it generates other tokens"
        )
        raise GateRefused(
            f"The converted model decodes wrongly: with a cache {problem}. This is a fault of the conversion, "
            "not of the recipe; please report it with the model's config.json and the recipe."
        )
    gate = validation.gate
    if gate is not None and not gate.passed:
        problems = list(_beyond(validation, gate))
        raise GateRefused(f"The gate refused: {'; '.join(problems)}: try {_remedy(validation, gate)}.")


def _beyond(validation: Validation, gate: GateResult) -> Iterator[str]:
    """What exceeds a limit, and by how much. What is not a number exceeds every limit."""
    limit = gate.max_perplexity_increase
    perplexity = validation.perplexity
    if not perplexity.increase <= limit:
        yield (
            f"perplexity rises by {perplexity.increase:.2%} (limit {format_percent(limit)}), from "
            f"{perplexity.before:.2f} to {perplexity.after:.2f}"
        )
    if validation.long is not None and not validation.long.texts.increase <= limit:
        texts = validation.long.texts
        yield (
            f"perplexity of texts of {validation.long.before.length:,} tokens rises by "
            f"{with_error(f'{texts.increase:.2%}', texts.increase_error, '.2%')} (limit {format_percent(limit)}), from "
            f"{texts.before.perplexity:.2f} to {texts.after.perplexity:.2f}"
        )
    if copying := _copying_beyond(validation, gate):
        told = [
            f"{with_error(f'{rise.value:+.3f}', rise.error, '.3f')} nats at distance {distance:,}"
            for distance, rise in copying
        ]
        yield f"copying from the context gets worse by {', '.join(told)} (limit {gate.max_copying_increase:g})"


def _copying_beyond(validation: Validation, gate: GateResult) -> list[tuple[int, Mean]]:
    if validation.copying is None or gate.max_copying_increase is None:
        return []
    rises = ((distance, change.rise) for distance, change in validation.copying.distances)
    return [(distance, rise) for distance, rise in rises if not rise.value <= gate.max_copying_increase]


def _remedy(validation: Validation, gate: GateResult) -> str:
    """What to try, in the order of what helps most."""
    remedies = ["a recipe that shares less"]
    if validation.long is not None:
        remedies[0] = "a recipe that saves less"
    increases = [validation.perplexity.increase]
    if validation.long is not None:
        increases.append(validation.long.texts.increase)
    worst = max((increase for increase in increases if math.isfinite(increase)), default=0.0)
    if worst > gate.max_perplexity_increase:
        remedies.append(f"--max-perplexity-increase {math.ceil(worst * 100)}%")
    if copying := _copying_beyond(validation, gate):
        remedies[0] = "a recipe that saves less, or has longer windows on the heads that retrieve"
        worst = max((rise.value for _, rise in copying if math.isfinite(rise.value)), default=math.inf)
        if math.isfinite(worst):
            remedies.append(f"max_copying_increase: {math.ceil(worst * 100) / 100:g} under gate in the recipe")
    return ", or ".join(remedies)
