"""Does a model that decodes with a cache say the same as in one pass? Perplexity runs without a cache and cannot tell."""

from typing import TYPE_CHECKING, Any

from sa_convert.data.report import DecodeCheck
from sa_convert.progress import progress
from sa_convert.validate.perplexity import input_device

if TYPE_CHECKING:
    import torch

TOLERANCE = {"float64": 1e-8, "float32": 1e-3, "float16": 5e-2, "bfloat16": 3e-1}
"""Largest logit difference that rounding may make, for logits up to LOGIT_SCALE; it grows with larger logits."""

LOGIT_SCALE = 30.0

GENERATED = 32


def decode_check(model: Any, sequence: "torch.Tensor", generated: int = GENERATED) -> DecodeCheck:
    """Compare cached with uncached decoding of one sequence (L) of tokens.

    Logits: the first half of the sequence in one cached pass and then token by token, against the whole sequence in one
    pass without a cache. Tokens: up to `generated` greedy tokens after the first half, with the cache and without. Tokens
    that differ only because two logits are equal within the tolerance count as the same.
    """
    import torch

    tokens = sequence[None].to(input_device(model))
    half = len(sequence) // 2
    generated = min(generated, len(sequence) - half)  # a model may have no further positions
    steps = len(sequence) - half + 2 * generated
    with torch.inference_mode(), progress(steps, "decode check", unit="tok") as bar:
        whole = model(input_ids=tokens, use_cache=False).logits[0].float().cpu()
        cached = _cached_logits(model, tokens, half, bar)
        tolerance = _tolerance(model, whole)
        same = _same_greedy_tokens(model, tokens[:, :half], generated, tolerance, bar)
    return DecodeCheck((cached - whole).abs().max().item(), same, tolerance)


def _tolerance(model: Any, logits: "torch.Tensor") -> float:
    dtype = str(model.dtype).removeprefix("torch.")
    return TOLERANCE[dtype] * max(1.0, logits.abs().max().item() / LOGIT_SCALE)


def _cached_logits(model: Any, tokens: "torch.Tensor", half: int, bar: Any) -> "torch.Tensor":
    """Logits (L, vocabulary) of tokens (1, L): the first half at once, the others one by one, float32 on the CPU."""
    import torch

    output = model(input_ids=tokens[:, :half], use_cache=True)
    logits = [output.logits[0].float().cpu()]
    for place in range(half, tokens.shape[1]):
        mask = torch.ones_like(tokens[:, : place + 1])
        output = model(
            input_ids=tokens[:, place : place + 1],
            attention_mask=mask,
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        logits.append(output.logits[0].float().cpu())
        bar.update()
    return torch.cat(logits)


def _same_greedy_tokens(model: Any, prompt: "torch.Tensor", generated: int, tolerance: float, bar: Any) -> bool:
    import torch

    cached, uncached = (_generate(model, prompt, generated, use_cache, bar) for use_cache in (True, False))
    if cached.shape != uncached.shape:
        return False
    differ = (cached != uncached)[0].nonzero()
    if not len(differ):
        return True
    first = int(differ[0])
    logits = model(input_ids=cached[:, :first].to(prompt.device), use_cache=False).logits[0, -1].float()
    gap = logits[cached[0, first]] - logits[uncached[0, first]]
    return bool(torch.abs(gap) <= tolerance)


def _generate(model: Any, prompt: "torch.Tensor", generated: int, use_cache: bool, bar: Any) -> "torch.Tensor":
    """Greedy continuation of exactly `generated` tokens, whatever the model's generation config prefers."""
    import torch

    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=generated,
        min_new_tokens=generated,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=0,
        use_cache=use_cache,
        streamer=_Ticks(bar),
    ).cpu()


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
