"""The process in which one model is timed: `python -m sa_convert.measure.speed.worker`.

It reads requests from stdin, one JSON object a line, and answers each with one on stdout: the result, or "error" (a
line for the user) and "kind" (its class in `sa_convert.errors`). It ends when stdin does, so it never outlives its
parent for longer than one pass.
"""

import json
import os
import sys
import traceback
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sa_convert.errors import SaConvertError

_PROBE = 8
"""Tokens of the pass that tells which weights are read."""


class Timer:
    """What a worker can do; each public method is a request, by its name. Call in inference mode."""

    def __init__(self, stack: ExitStack) -> None:
        """stack: holds the loaded model."""
        self._stack = stack
        self._runner: Any = None
        self._memory: Any = None

    def load(self, subject: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        """Load a model and describe it. subject, options: fields of `Subject` and `BenchOptions`."""
        import torch

        from sa_convert.measure.speed.parameters_read import weights_of
        from sa_convert.measure.speed.peak_memory import PeakMemory
        from sa_convert.measure.speed.request import BenchOptions
        from sa_convert.measure.speed.runner import Runner
        from sa_convert.models.auto_class import prediction_task
        from sa_convert.models.load import embedded_tokens, first_line
        from sa_convert.models.placement import placed, usable_positions
        from sa_convert.models.subject import Subject

        named, asked = Subject(**{**subject, "folder": Path(subject["folder"])}), BenchOptions(**options)
        name = named.name
        if asked.threads is not None:
            torch.set_num_threads(asked.threads)
        task = prediction_task(named.config, name)
        placement = placed(named.folder, asked)
        if placement.max_memory is not None:
            raise SaConvertError(
                f"{name}: does not fit into the free memory of {placement.device} beside the other model, and from "
                "the disk its speed would be the disk's: free memory, or give a narrower --dtype."
            )
        model = self._stack.enter_context(named.load(placement)).model
        if asked.attention is not None:
            try:
                model.set_attn_implementation(asked.attention)
            except (ValueError, ImportError) as error:
                raise SaConvertError(
                    f"{name}: cannot run with --attn {asked.attention}: {first_line(error)}"
                ) from error
        self._runner = runner = Runner(model, task, asked.static, asked.seed)
        self._memory = PeakMemory(placement.device)
        runner.begin(_PROBE, 1, 1)
        weights = weights_of(model, runner.prefill, runner.step if runner.caches else None, runner.keeps_one)
        runner.forget()
        parameters = list(model.parameters())
        return {
            "task": task,
            "device": placement.device,
            "dtype": placement.dtype_name,
            "itemsize": placement.dtype.itemsize,
            "threads": torch.get_num_threads(),
            "attention": model.config.get_text_config(decoder=True)._attn_implementation,
            "vocabulary": embedded_tokens(model),
            "positions": usable_positions(model),
            "parameters": sum(parameter.numel() for parameter in parameters),
            "weight_bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
            "weights": asdict(weights),
            "memory": self._memory.kind,
        }

    def begin(self, context: int, batch: int, steps: int) -> dict[str, Any]:
        self._runner.begin(context, batch, steps)
        self._memory.reset()
        return {}

    def prefill(self) -> dict[str, Any]:
        seconds = self._runner.prefill()
        return {"seconds": seconds, "cache_bytes": self._runner.cache_bytes() if self._runner.caches else None}

    def decode(self, steps: int) -> dict[str, Any]:
        return {"seconds": [self._runner.step() for _ in range(steps)]}

    def end(self) -> dict[str, Any]:
        peak = self._memory.read()
        self._runner.forget()
        return {"peak_memory": peak}


def _answer(timer: Timer, request: dict[str, Any]) -> dict[str, Any]:
    import torch

    do, name = request.pop("do"), request.pop("of")
    try:
        with torch.inference_mode():
            answer: dict[str, Any] = getattr(timer, do)(**request)
        return answer
    except SaConvertError as error:
        traceback.print_exc()
        return {"error": str(error), "kind": type(error).__name__}
    except Exception as error:  # whatever a model's own code raises
        traceback.print_exc()
        return {"error": _explained(name, error), "kind": "SaConvertError"}


def _explained(name: str, error: Exception) -> str:
    import torch

    from sa_convert.models.load import first_line

    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return f"{name}: not enough memory for this context and batch: give smaller --contexts or --batches."
    return f"{name}: cannot be run: {type(error).__name__}: {first_line(error)}"


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    from sa_convert.models.quiet import keep_module_cache_clean, quiet

    keep_module_cache_clean()
    # The slow imports, now: the first request may come later, after that of another process.
    from transformers import PreTrainedModel  # noqa: F401

    with ExitStack() as stack:
        stack.enter_context(quiet())
        timer = Timer(stack)
        for line in sys.stdin:
            answers.write(json.dumps(_answer(timer, json.loads(line))) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
