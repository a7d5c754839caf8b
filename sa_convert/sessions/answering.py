"""One answer of a model to a text, most of which its cache knows, by generate() of transformers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sa_convert.models.arguments import cache_keyword
from sa_convert.models.device import input_device
from sa_convert.models.quiet import quiet


def generate(
    model: Any,
    tokenizer: Any,
    tokens: Sequence[int],
    cache: Any,
    most: int,
    *told: Any,
) -> list[int]:
    """Tokens after `tokens`, whose first ones are in `cache`, which afterwards has all but the last one.

    most: of new tokens. told: a streamer of transformers or None; a function that is asked after each token whether to
    stop; options of generate(), such as do_sample.
    """
    streamer, stop, options = told
    ids = torch.tensor([list(tokens)], device=input_device(model))
    with quiet(), torch.inference_mode():
        text = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            streamer=streamer,
            stopping_criteria=_criteria(stop),
            use_cache=True,
            **{cache_keyword(model): cache, **_ends(model, tokenizer), **options},
        )
    found: list[int] = text[0, len(tokens) :].tolist()
    return found


def _criteria(stop: Callable[[], bool]) -> Any:
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Asked(StoppingCriteria):
        """Ends the text if the user wants that."""

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), stop(), device=input_ids.device)

    return StoppingCriteriaList([Asked()])


def _ends(model: Any, tokenizer: Any) -> Mapping[str, Any]:
    """Tokens that end an answer: those of the model's generation config, and the tokenizer's."""
    told = model.generation_config.eos_token_id
    ends = {*(told if isinstance(told, list) else [told]), tokenizer.eos_token_id} - {None}
    pad = model.generation_config.pad_token_id
    if pad is None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    return {"pad_token_id": pad, **({"eos_token_id": sorted(ends)} if ends else {})}
