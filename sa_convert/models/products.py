"""Which library multiplies float32 matrices on a processor.

torch takes MKL unless it is told that precision may be lower. Then it takes oneDNN, which on processors of AMD is twice
as fast. Where the processor has no matrix units (AMX), it is as precise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

SIZE = 256
"""Rows and columns of the matrices by which precision is measured."""

ROUNDING = 1e-5
"""The largest error of a product of such matrices of random numbers, to its largest element, that float32 makes: MKL
and oneDNN make 1e-6 or less, factors that are rounded to TF32 or bfloat16 3e-4 and more."""


@contextmanager
def fast_products() -> Iterator[None]:
    """While open, float32 matrices may be multiplied with less precision where that is faster.

    Processors with matrix units (AMX) round the factors to bfloat16, accelerators to TF32.
    """
    with _precision("medium"):
        yield


@contextmanager
def plain_products() -> Iterator[None]:
    """While open, float32 matrices are multiplied as torch does unless it is told otherwise, which is how people run
    models: so for what tells about rounding itself."""
    with _precision("highest"):
        yield


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def precise_products(device: str) -> Iterator[None]:
    """While open, float32 matrices are multiplied faster on a processor that is as precise then. Elsewhere nothing
    changes."""
    if device != "cpu" or not _as_precise():
        yield
        return
    with fast_products():
        yield


@cache
def _as_precise() -> bool:
    """Whether products stay within ROUNDING on this machine."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, SIZE, SIZE, generator=generator).unbind()
    exact = one.double() @ other.double()
    with fast_products():
        return error_of(torch.nn.functional.linear(one, other.T), exact) < ROUNDING


def error_of(product: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error, to the largest element."""
    return float((product - exact).abs().max() / exact.abs().max())
