"""One model that is timed: prefill, then decoding step by step, as generate() calls it."""

from inspect import signature
from time import perf_counter
from typing import Any

import torch

from sa_convert.domain.report import PredictionTask
from sa_convert.errors import SaConvertError
from sa_convert.measure.quality.cache_bytes import held
from sa_convert.models.arguments import cache_keyword, cache_of, caches_in, dynamic_cache
from sa_convert.models.device import input_device
from sa_convert.models.load import embedded_tokens
from sa_convert.models.steps import step_inputs


class Runner:
    """Runs `model` on random tokens. One forward pass over B sequences of C tokens is a prefill; a step adds one token
    to each. An encoder-decoder reads the context in its encoder and has as long a text in its decoder.

    task: see `sa_convert.models.auto_class.prediction_task`. static: a static cache of the very size that is needed,
    instead of the one that the model makes for itself. Call in inference mode.
    """

    def __init__(self, model: Any, task: PredictionTask, static: bool, seed: int) -> None:
        self.model, self.caches, self._static, self._seed = model, task != "masked-token", static, seed
        self._reads_source = task == "teacher-forced"
        self.keeps_one = "logits_to_keep" in signature(model.forward).parameters
        self._hands_cache = static  # rather than let the model make its own
        self._cache: Any = None
        self._read: Any = None  # the encoder's output

    def begin(self, context: int, batch: int, steps: int) -> None:
        """Forget everything, and take new tokens for prefills of `context` and at most so many steps after each."""
        self.forget()
        self._context, self._room, self._position = context, context + steps, context
        special = _special_tokens(self.model.config)
        ordinary = torch.tensor([token for token in range(embedded_tokens(self.model)) if token not in special])
        generator = torch.Generator().manual_seed(self._seed)
        chosen = torch.randint(len(ordinary), (batch, self._room), generator=generator)
        self._tokens = ordinary[chosen].to(input_device(self.model))

    def prefill(self) -> float:
        """Seconds of a pass over the context, with a new cache."""
        self.forget()  # the old cache would count as memory that the pass needs
        self._position = self._context
        tokens = self._tokens[:, : self._context]
        inputs: dict[str, Any] = {"input_ids": tokens}
        if self._reads_source:
            inputs["decoder_input_ids"] = tokens.flip(1)
        else:
            inputs["attention_mask"] = torch.ones_like(tokens)
        if self.caches:
            inputs["use_cache"] = True
            if self._hands_cache:
                self._cache = inputs[cache_keyword(self.model)] = self._new_cache()
            if self.keeps_one:
                inputs["logits_to_keep"] = 1
        seconds = self._timed(inputs)
        if self.caches and self._cache is None:
            self._hands_cache = True
            return self.prefill()
        return seconds

    def step(self) -> float:
        """Seconds of a pass over one more token of each sequence."""
        read = self._read if self._reads_source else None
        inputs = step_inputs(self.model, self._tokens, self._position, self._cache, read)
        self._position += 1
        return self._timed(inputs)

    def cache_bytes(self) -> int:
        """What the next step needs of the cache: keys, values, and states of layers without softmax attention."""
        for part in caches_in(self._cache):
            if not hasattr(part, "layers"):
                raise SaConvertError(f"The model keeps a {type(part).__name__}, whose bytes bench cannot count.")
        return held(self._cache).needed

    def forget(self) -> None:
        """Give up the cache."""
        self._cache = self._read = None

    def _timed(self, inputs: dict[str, Any]) -> float:
        device = self._tokens.device
        _synchronize(device)
        start = perf_counter()
        output = self.model(**inputs)
        _synchronize(device)
        seconds = perf_counter() - start
        if self.caches:
            cache = cache_of(output)
            self._cache = self._cache if cache is None else cache
            self._read = getattr(output, "encoder_last_hidden_state", None)
        return seconds

    def _new_cache(self) -> Any:
        if not self._static:
            return dynamic_cache(self.model)
        from transformers import StaticCache

        return StaticCache(config=self.model.config.get_text_config(decoder=True), max_cache_len=self._room)


def _special_tokens(config: Any) -> set[int]:
    """Tokens that mean something to the model's code, such as padding or the place of an image."""
    special: set[int] = set()
    for part in (config, config.get_text_config(decoder=True)):
        for key, value in part.to_dict().items():
            if key.endswith(("_token_id", "_token_index")):
                special |= {
                    token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)
                }
    return special


def _synchronize(device: torch.device) -> None:
    """Wait for the device, which computes while Python goes on."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
