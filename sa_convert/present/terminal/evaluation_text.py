"""How an evaluation is shown in a terminal."""

from collections.abc import Iterator

from sa_convert.console.amounts import with_error
from sa_convert.domain.evaluation import Evaluation, ModelQuality
from sa_convert.domain.long_context import LongContext
from sa_convert.domain.losses import LossChange, Losses
from sa_convert.domain.report import TASK_NAMES, DecodeCheck


def render_evaluation(evaluation: Evaluation) -> str:
    """An aligned table, one column for each model and one for the difference; no final newline."""
    rows = list(_rows(evaluation))
    columns = max(len(cells) for _, cells in rows)
    labels = max(len(label) for label, _ in rows) + 2
    widths = [max([0, *(len(cells[n]) for _, cells in rows if n < len(cells))]) + 2 for n in range(columns)]
    table = [f"{label:<{labels}}" + "".join(map(str.ljust, cells, widths)).rstrip() for label, cells in rows]
    return "\n".join([*table, "", *_notes(evaluation)])


def _rows(evaluation: Evaluation) -> Iterator[tuple[str, list[str]]]:
    """Label and cells: of the model, and with another one its own and the difference."""
    model, against = evaluation.model, evaluation.against
    yield "", [model.name] if against is None else [model.name, against.name, "difference"]
    yield "Precision", [quality.dtype for quality in _both(evaluation)]
    change = [] if against is None else [f"{model.perplexity / against.perplexity - 1:+.2%}"]
    yield (
        f"Perplexity{TASK_NAMES[evaluation.task]}",
        [f"{quality.perplexity:.3f}" for quality in _both(evaluation)] + change,
    )
    if checks := _checks(evaluation):
        yield "Cached decoding", [_decoding(check) for check in checks]
    if not model.copying:
        return
    yield "Copying loss, nats", _losses([quality.headline.loss for quality in _both(evaluation)])
    changes = dict(evaluation.copying_change)
    for number, copying in enumerate(model.copying):
        both = [quality.copying[number].by_probe for quality in _both(evaluation)]
        yield f"  at distance {copying.distance}", _means(both, changes.get(copying.distance))
    if model.long is not None:
        yield from _long(evaluation, [quality.long for quality in _both(evaluation) if quality.long is not None])


def _long(evaluation: Evaluation, both: list[LongContext]) -> Iterator[tuple[str, list[str]]]:
    """both: of one model or of two."""
    change = evaluation.long_change
    yield (
        f"Perplexity of {both[0].length:,} tokens",
        _perplexities([long.texts for long in both], change.texts if change else None),
    )
    changes = [found for *_, found in change.positions] if change else []
    for number, at in enumerate(both[0].positions):
        losses = [long.positions[number].losses for long in both]
        yield f"  at {at.start}-{at.stop - 1}", _perplexities(losses, changes[number] if changes else None)
    needles = dict(change.needle) if change else {}
    for number, needle in enumerate(both[0].needle):
        losses = [long.needle[number].losses for long in both]
        yield f"Needle at depth {needle.label}, nats", _means(losses, needles.get(needle.label))


def _means(both: list[Losses], change: LossChange | None) -> list[str]:
    """Of both models, and the rise."""
    return [with_error(f"{losses.mean:.3f}", losses.error, ".3f") for losses in both] + (
        [with_error(f"{change.rise.value:+.3f}", change.rise.error, ".3f")] if change else []
    )


def _perplexities(both: list[Losses], change: LossChange | None) -> list[str]:
    cells = [f"{losses.perplexity:.3f}" for losses in both]
    return cells + ([with_error(f"{change.increase:+.2%}", change.increase_error, ".2%")] if change else [])


def _losses(losses: list[float]) -> list[str]:
    difference = [f"{losses[0] - losses[1]:+.3f}"] if len(losses) == 2 else []
    return [f"{loss:.3f}" for loss in losses] + difference


def _decoding(check: DecodeCheck) -> str:
    tokens = "" if check.same_greedy_tokens else ", OTHER GREEDY TOKENS"
    return f"{'passed' if check.passed else 'FAILED'} ({check.max_abs_logit_difference:.2g}{tokens})"


def _notes(evaluation: Evaluation) -> Iterator[str]:
    model, agreement = evaluation.model, evaluation.agreement
    if agreement is not None and evaluation.against is not None:
        yield f"KL({evaluation.against.name} || {model.name}): {agreement.kl:.4g} nats per token"
        yield f"Same most likely token: {agreement.top1:.2%} of {agreement.tokens:,} positions"
    yield (
        f"Text: {evaluation.text}; {evaluation.tokens:,} tokens in {evaluation.sequences} sequences of "
        f"{evaluation.length}"
    )
    if model.decode_check is not None:
        tolerance = model.decode_check.tolerance
        yield f"Cached decoding: largest difference of a logit from a pass without a cache (tolerance {tolerance:.2g})"
    else:
        yield "Cached decoding: not checked, since the model caches nothing"
    if not model.copying:
        yield "Copying: not probed, since the model does not predict each token from those before it in the same text"
        return
    yield (
        f"Copying: {model.period} random tokens repeated to {evaluation.probe_length}, loss from the second occurrence "
        f"on, {evaluation.probes} probes (seed {evaluation.seed}); at a distance: so many random tokens, loss on their "
        "second occurrence"
    )
    if (long := model.long) is not None:
        yield (
            f"Long text: {len(long.texts.samples)} texts of {long.length} tokens; needles: code words planted at such "
            "depths of them, loss where they are asked for at the end"
        )
    yield "±: one standard error, in the last column of the paired difference"


def _checks(evaluation: Evaluation) -> list[DecodeCheck]:
    return [check for quality in _both(evaluation) if (check := quality.decode_check) is not None]


def _both(evaluation: Evaluation) -> list[ModelQuality]:
    return [evaluation.model] if evaluation.against is None else [evaluation.model, evaluation.against]
