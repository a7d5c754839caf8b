"""Does a model say the same with a cache as in one pass? Perplexity runs without a cache and cannot tell."""

from typing import Any

import torch

from sa_convert.console.progress import progress
from sa_convert.domain.report import DecodeCheck
from sa_convert.measure.quality.walk import walk
from sa_convert.models.steps import Steps
from sa_convert.models.task import Decoding

TOLERANCE = 1e-3
"""Largest difference that rounding may make to a logit in float32, for logits up to LOGIT_SCALE; it grows in proportion
to larger logits. SmolLM2-135M differs by 1e-4."""

LOGIT_SCALE = 30.0

ROUNDING_MARGIN = 3.0
"""In lower precision rounding depends on the model (SmolLM2-135M: 0.1 in float16, 0.8 in bfloat16), so there the
tolerance is this many times the difference that the base model shows itself, if that is more."""

GENERATED = 32

PREFIXES = 8

TREMBLE, TREMBLES = 1e-5, 16
"""What rounding in float32 does to the numbers inside of a model, on the safe side, and how often it is tried."""


def decode_check(
    model: Any,
    sequence: torch.Tensor,
    rounding: float = 0.0,
    source: torch.Tensor | None = None,
    pieces: tuple[int, ...] | None = None,
) -> DecodeCheck:
    """Compare cached with uncached decoding of one sequence (L) of tokens.

    Logits: the sequence in these pieces, with a cache, against the whole sequence in one pass without. Tokens: up to
    GENERATED tokens that generate() adds to a first part of the sequence, greedily and with a cache, must each be the
    best one in a pass without a cache; one that is worse by less than the tolerance counts as the best. rounding: the
    difference of logits that the base model shows on this sequence in this dtype. source: (S,), what an encoder reads;
    the sequence is then the decoder's. pieces: their sizes; None: the first half, then token by token, and the first
    half is the part that generate() is given; otherwise all but the last GENERATED tokens.
    """
    steps = Steps(model, Decoding(sequence, source))
    prompt = len(sequence) // 2 if pieces is None else max(1, len(sequence) - GENERATED)
    pieces = walk(len(sequence)) if pieces is None else pieces
    generated = min(GENERATED, len(sequence) - prompt)  # a model may have no further positions
    with torch.inference_mode(), progress(len(pieces) - 1 + generated, "decode check", unit="tok") as bar:
        difference, largest = _compare_logits(steps, pieces, bar)
        tolerance = max(_tolerance(largest), ROUNDING_MARGIN * rounding)
        text = steps.generate(steps.tokens[:, :prompt], generated, _Ticks(bar))
        logits = steps.whole(text[:, :-1])[prompt - 1 :].float()
        chosen = logits.gather(1, text[0, prompt:, None].to(logits.device))[:, 0]
        same = bool((logits.amax(1) - chosen <= tolerance).all())
    return DecodeCheck(difference, same, tolerance)


def continues_in(
    model: Any, sequence: torch.Tensor, pieces: tuple[int, ...], source: torch.Tensor | None = None
) -> bool:
    """Whether a model that is known to be right says the same of a sequence in these pieces as in one, in float32.

    Models with recurrent layers may take single tokens only, once their cache has been filled. In lower precision
    nothing is known, and `rounding_difference` compares.
    """
    if rounds(model):
        return True
    try:
        with torch.inference_mode(), progress(len(pieces) - 1, "decode check of the base model", unit="tok") as bar:
            difference, largest = _compare_logits(Steps(model, Decoding(sequence, source)), pieces, bar)
    except (RuntimeError, ValueError, IndexError):
        return False  # it cannot be asked so
    return difference <= _tolerance(largest)


def _tolerance(largest: float) -> float:
    """In float32. largest: logit."""
    return TOLERANCE * max(1.0, largest / LOGIT_SCALE)


def rounds(model: Any) -> bool:
    """Whether a model rounds more than float32 does: by its dtype, or because a part of it is quantised.

    Modules for quantised weights round what they are given, too, in a way that depends on how many tokens that is.
    """
    return is_quantised(model) or model.dtype.itemsize < torch.float32.itemsize


def is_quantised(model: Any) -> bool:
    """Whether modules of the model hold quantised weights."""
    return bool(getattr(model, "is_quantized", False))


def rounding_difference(
    model: Any,
    sequence: torch.Tensor,
    source: torch.Tensor | None = None,
    pieces: tuple[int, ...] | None = None,
) -> float:
    """What rounding alone does to the logits of a model that is known to decode rightly: 0 in plain float32, where
    TOLERANCE is known to hold. If a part of the model is quantised, `_trembling` counts, too. pieces: as for
    `decode_check`."""
    if not rounds(model):
        return 0.0
    pieces = pieces or walk(len(sequence))
    with torch.inference_mode(), progress(len(pieces) - 1, "decode check of the base model", unit="tok") as bar:
        shown = _compare_logits(Steps(model, Decoding(sequence, source)), pieces, bar)[0]
    if not is_quantised(model):
        return shown
    return max(shown, _trembling(model, Steps(model, Decoding(sequence, source))))


def rounding_without_cache(model: Any, sequence: torch.Tensor, source: torch.Tensor | None = None) -> float:
    """What rounding does to the logits of a model that nothing is known of: those of prefixes of the sequence (L)
    against those of the whole, all without a cache. 0 in plain float32, where TOLERANCE is known to hold.

    Odd lengths, since matrices of other shapes are multiplied in another order. SmolLM2-135M shows as much this way as
    by decoding with a cache: 0.9 and 0.8 in bfloat16, 0.09 both ways in float16. If a part of the model is quantised,
    prefixes of all lengths, since bitsandbytes rounds at some of them only, and also see `_trembling`.
    """
    if not rounds(model):
        return 0.0
    steps = Steps(model, Decoding(sequence, source))
    half, largest = len(sequence) // 2, 0.0
    lengths = sorted({(half + (len(sequence) - half) * part // PREFIXES) | 1 for part in range(PREFIXES)})
    if is_quantised(model):
        lengths, largest = list(range(1, len(sequence))), _trembling(model, steps)
    with torch.inference_mode(), progress(len(lengths), "rounding", unit="pass") as bar:
        whole = steps.whole(steps.tokens).float()
        for length in lengths:
            part = steps.whole(steps.tokens[:, :length]).float()
            largest = max(largest, (part - whole[: part.shape[0]]).abs().max().item())
            bar.update()
    return largest


def _trembling(model: Any, steps: Steps) -> float:
    """How far logits move when the embeddings of the tokens move by TREMBLE of themselves, at most of several times.

    Modules that round what they are given to 8 bits turn the least difference into a step, if it lies at the border of
    two numbers. Whether one does in a given sequence is chance, which the base and the converted model need not share.
    """
    generator = torch.Generator().manual_seed(0)

    def tremble(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
        return output * (1 + TREMBLE * noise)

    with torch.inference_mode():
        still = steps.whole(steps.tokens).float()
        hook = model.get_input_embeddings().register_forward_hook(tremble)
        try:
            return max((steps.whole(steps.tokens).float() - still).abs().max().item() for _ in range(TREMBLES))
        finally:
            hook.remove()


def _compare_logits(steps: Steps, pieces: tuple[int, ...], bar: Any) -> tuple[float, float]:
    """The largest difference between cached and uncached logits, and the largest logit."""
    whole = steps.whole(steps.tokens).float().cpu()
    cached = _cached_logits(steps, pieces, bar)
    return (cached - whole).abs().max().item(), whole.abs().max().item()


def _cached_logits(steps: Steps, pieces: tuple[int, ...], bar: Any) -> torch.Tensor:
    """Logits (L, vocabulary) of the tokens in these pieces, float32 on the CPU."""
    output = steps.first(steps.tokens[:, : pieces[0]])
    logits, position = [output.logits[0].float().cpu()], pieces[0]
    for size in pieces[1:]:
        output = steps.next(output, position, size)
        logits.append(output.logits[0].float().cpu())
        position += size
        bar.update()
    return torch.cat(logits)


class _Ticks:
    """What generate() calls with the prompt, with every new token, and at the end."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._prompt = True

    def put(self, value: Any) -> None:
        if not self._prompt:
            self._bar.update()
        self._prompt = False

    def end(self) -> None:
        pass
