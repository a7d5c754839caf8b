"""A model that decodes: in one pass without a cache, step by step with one, and by generate()."""

from typing import Any

import torch

from sa_convert.families.table import family_named
from sa_convert.models.arguments import cache_keyword, cache_of, dynamic_cache
from sa_convert.models.device import input_device
from sa_convert.models.task import Decoding


class Steps:
    """Calls of `model` for one sequence. With a source, the decoder's text; the encoder runs in `whole` and `first`.

    cache: what `first` and `next` have filled.
    """

    cache: Any = None

    def __init__(self, model: Any, decoding: Decoding) -> None:
        self.model = model
        self.tokens = decoding.tokens[None].to(input_device(model))
        self._source = None if decoding.source is None else decoding.source[None].to(input_device(model))

    def whole(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (T, vocabulary) of tokens (1, T), without a cache."""
        logits: torch.Tensor = self.model(**self._named(tokens), use_cache=False).logits[0]
        return logits

    def first(self, tokens: torch.Tensor, **more: Any) -> Any:
        """The model's output for tokens (1, T), with a new cache. more: further arguments of its forward."""
        output = self.model(**self._named(tokens), use_cache=True, **more)
        self.cache = cache_of(output)
        if self.cache is None:
            self.cache = dynamic_cache(self.model)
            more[cache_keyword(self.model)] = self.cache
            output = self.model(**self._named(tokens), use_cache=True, **more)
        return output

    def next(self, output: Any, position: int, count: int = 1) -> Any:
        """The model's output for `count` tokens from `position` on, with the cache and the `output` for all before."""
        read = None if self._source is None else output.encoder_last_hidden_state
        return self.model(**step_inputs(self.model, self.tokens, position, self.cache, read, count))

    def generate(self, prompt: torch.Tensor, tokens: int, streamer: Any) -> torch.Tensor:
        """The prompt (1, T) and `tokens` greedy ones after it, decoded with a cache as transformers does it."""
        from transformers import GenerationConfig

        inputs = self._named(prompt)
        # The model's own may sample, stop early, or forbid tokens.
        config = GenerationConfig(pad_token_id=0)
        if self._source is not None:
            config.decoder_start_token_id = int(prompt[0, 0])
        preferred, self.model.generation_config = self.model.generation_config, config
        try:
            text: torch.Tensor = self.model.generate(
                **inputs,
                attention_mask=torch.ones_like(inputs["input_ids"]),
                max_new_tokens=tokens,
                do_sample=False,
                use_cache=True,
                streamer=streamer,
            )
            return text
        finally:
            self.model.generation_config = preferred

    def _named(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        if self._source is None:
            return {"input_ids": tokens}
        return {"input_ids": self._source, "decoder_input_ids": tokens}


def step_inputs(
    model: Any, tokens: torch.Tensor, position: int, cache: Any, read: Any = None, count: int = 1
) -> dict[str, Any]:
    """What `model` is called with for `count` tokens from `position` on of tokens (B, T), once those before are in the
    cache. read: the encoder's last hidden state, of an encoder-decoder.
    """
    from transformers.modeling_outputs import BaseModelOutput

    token = tokens[:, position : position + count]
    inputs = {cache_keyword(model): cache, "use_cache": True}
    if read is not None:
        return inputs | {"decoder_input_ids": token, "encoder_outputs": BaseModelOutput(last_hidden_state=read)}
    inputs |= {"input_ids": token, "attention_mask": torch.ones_like(tokens[:, : position + count])}
    family = family_named(model.config.model_type)
    if family is not None and family.told_positions:  # as generate() tells them
        inputs["position_ids"] = torch.arange(position, position + count, device=token.device).expand_as(token)
    return inputs
