"""What is counted and named the same way for all methods."""

import hashlib
import math
from fractions import Fraction
from typing import Any

import torch
from quality_baselines import Spans
from torch.nn import functional

from sa_convert.console.progress import progress
from sa_convert.domain.geometry import ModelGeometry


def cache_bytes(geometry: ModelGeometry, itemsize: int, without: tuple[int, ...] = ()) -> int:
    """Bytes that one token takes in the KV cache. without: layers that cache nothing. itemsize: bytes of a number."""
    kept = [layer for index, layer in enumerate(geometry.layers) if index not in without]
    return sum(2 * layer.groups * layer.head_dim * itemsize for layer in kept)


def whole_layers(budget: Fraction, depth: int) -> int:
    """The most layers, but at least one, whose keys are no more than a part `budget` of the key cache."""
    return max(1, math.floor(budget * depth))


def layers_around(budget: Fraction, depth: int) -> list[int]:
    """The fewest layers that, without keys and values, save as many bytes as `budget` of the key cache; before it one
    less, if that number saves over a tenth more than it should."""
    exact = budget * depth / 2
    most = math.ceil(exact)
    return [most] if most <= exact * Fraction(11, 10) or most == 1 else [most - 1, most]


def sequence_losses(model: Any, tokens: torch.Tensor, description: str) -> list[float]:
    """Mean loss of each sequence of (N, T) tokens, in nats."""
    losses = []
    with torch.inference_mode(), progress(len(tokens), description, unit="seq") as bar:
        for row in tokens:
            logits = model(input_ids=row[None], use_cache=False).logits[0]
            losses.append(functional.cross_entropy(logits[:-1].float(), row[1:]).item())
            bar.update()
    return losses


def named(spans: Spans) -> str:
    """Such as "17-20 <- 16, 25 <- 24"."""
    return ", ".join(
        f"{first}-{last} <- {first - 1}" if last > first else f"{first} <- {last - 1}" for first, last in spans
    )


def percent(fraction: Fraction) -> float:
    return round(float(fraction * 100), 4)


def fingerprint(model: Any) -> str:
    """Of all weights, so that results of two models are never put side by side."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()
