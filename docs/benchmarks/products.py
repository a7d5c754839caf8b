"""How fast one core multiplies float32 matrices, and how well, by either library that torch has for it.

python docs/benchmarks/products.py
"""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from sa_convert.models.products import error_of, fast_products

RUNS = 20


def seconds(run: Callable[[], object]) -> float:
    """Of one run, of the processor."""
    run()
    begun = time.process_time()
    for _ in range(RUNS):
        run()
    return (time.process_time() - begun) / RUNS


def main() -> None:
    torch.set_num_threads(1)
    states, linear = torch.randn(2048, 576), torch.nn.Linear(576, 1536, bias=False)
    queries, keys = torch.randn(2, 9, 2048, 64).unbind()
    exact = states.double() @ linear.weight.double().T
    for name, context in (("as torch begins", nullcontext), ("fast_products", fast_products)):
        with torch.no_grad(), context():
            layer = 2 * 2048 * 576 * 1536 / seconds(lambda: linear(states)) / 1e9
            scores = 2 * 9 * 2048 * 2048 * 64 / seconds(lambda: queries @ keys.transpose(1, 2)) / 1e9
            error = error_of(linear(states), exact)
        print(f"{name}: a linear layer {layer:.0f} GFLOP/s, scores {scores:.0f} GFLOP/s, error {error:.1e}")


if __name__ == "__main__":
    main()
