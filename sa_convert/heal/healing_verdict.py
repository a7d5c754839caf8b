"""Which state of a healing is kept, if any: none that is worse than before, on any kind of text or at any distance.

Copying as good as the base's is good enough, though the model was better before: damage can make that loss smaller.
"""

from sa_convert.domain.healed import Judgement

TEXT_SLACK = 0.01
"""Nats by which the divergence on one kind of text may rise, if the mean falls."""

COPYING_SLACK = 0.05
"""Nats by which the loss at one distance may rise."""

MEAN_SLACK = 0.02
"""Nats by which the mean over distances may rise."""

COPYING_WEIGHT = 0.25
"""Of copying against text, if two states are both good enough."""


def worse(after: Judgement, before: Judgement, base: Judgement) -> tuple[str, ...]:
    """What is worse after healing than before, in words; nothing: it may be kept."""
    if not after.finite:
        return ("its losses are not finite",)
    found = []
    if after.mean_divergence >= before.mean_divergence:
        change = f"{before.mean_divergence:.4f} -> {after.mean_divergence:.4f} nats"
        found.append(f"divergence from the base on held-out text {change}")
    for kind, divergence in after.divergence.items():
        if divergence > before.divergence[kind] + TEXT_SLACK:
            found.append(f"divergence on {kind} {before.divergence[kind]:.4f} -> {divergence:.4f} nats")
    for distance, loss in after.copying.items():
        if loss > max(before.copying[distance], base.copying[distance]) + COPYING_SLACK:
            found.append(f"copying over {distance} tokens {before.copying[distance]:.3f} -> {loss:.3f} nats")
    allowed = [max(loss, base.copying[distance]) for distance, loss in before.copying.items()]
    if after.mean_copying > sum(allowed) / len(allowed) + MEAN_SLACK:
        found.append(f"copying {before.mean_copying:.3f} -> {after.mean_copying:.3f} nats")
    return tuple(found)


def score(judged: Judgement, base: Judgement) -> float:
    """The less the better. Copying better than the base's counts as the base's."""
    copying = [max(0.0, loss - base.copying[distance]) for distance, loss in judged.copying.items()]
    return judged.mean_divergence + COPYING_WEIGHT * sum(copying) / max(1, len(copying))


def best(curve: list[Judgement], base: Judgement) -> int | None:
    """Which of the judgements is the best that is no worse than the first, or None."""
    good = [at for at in range(1, len(curve)) if not worse(curve[at], curve[0], base)]
    return min(good, key=lambda at: score(curve[at], base)) if good else None
