"""torch.export of models with windows, low-rank keys and shared attention: one graph for all lengths; and a step with a
static cache, as ExecuTorch takes it."""

from copy import deepcopy

import pytest
import torch
from torch.export import Dim, export
from transformers.integrations import executorch

from support.memory_models import some_ids
from support.session_models import model_named
from support.windowed_models import MIXED, Pair, positions

LENGTH, ROOM = 14, 20


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask, position_ids):
        inputs = {"attention_mask": mask, "position_ids": position_ids, "use_cache": False}
        return self.model(input_ids=ids, **inputs).logits


def inputs(length):
    ids, mask = some_ids(length), torch.ones(2, length, dtype=torch.long)
    mask[0, :3] = 0
    return ids, mask, positions(mask)


@pytest.mark.parametrize(("model_type", "kernel"), [("llama", "sdpa"), ("llama", "eager"), ("gemma3_text", "sdpa")])
@torch.no_grad()
def test_windows_in_one_graph_for_all_lengths(model_type, kernel):
    """Shorter and longer than windows, padded on the left, against masked scores of the base."""
    pair, length = Pair(model_type, MIXED, kernel), Dim("length", min=2, max=256)
    shapes = ({1: length},) * 3
    graph = export(Logits(pair.model), inputs(LENGTH), dynamic_shapes=shapes, strict=False).module()
    for size in (5, 14, 40):
        ids, mask, places = inputs(size)
        expected, real = pair.expected(ids, mask, position_ids=places), mask.bool()
        torch.testing.assert_close(graph(ids, mask, places)[real], expected[real], atol=1e-4, rtol=1e-4)


def exported_steps(model):
    """What runs one token, given its place, through an exported graph with a static cache."""
    model.generation_config.cache_implementation, model.generation_config.use_cache = "static", True
    sliding = getattr(model.config, "sliding_window", None) is not None
    kind = "TorchExportableModuleWithHybridCache" if sliding else "TorchExportableModuleWithStaticCache"
    module = getattr(executorch, kind)(model, batch_size=1, max_cache_len=ROOM, device=torch.device("cpu"))
    first = {"input_ids": torch.tensor([[1]]), "cache_position": torch.tensor([0])}
    graph = export(module, (), first, strict=False).module()
    return lambda ids: torch.cat(
        [graph(input_ids=ids[:, at : at + 1], cache_position=torch.tensor([at])) for at in range(ids.shape[1])], dim=1
    )


@torch.no_grad()
def test_windows_in_a_static_cache():
    """One text after the other, which the cache still holds."""
    pair = Pair("llama", MIXED)
    run = exported_steps(pair.model)
    for ids in some_ids(LENGTH).split(1):
        torch.testing.assert_close(run(ids), pair.expected(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["share", "low rank, windows, share", "low rank, norms"])
@torch.no_grad()
def test_other_treatments_in_a_static_cache(name):
    """As the model computes without a cache, which other tests hold to the base."""
    model = deepcopy(model_named(name))  # other tests use it, too, and not with a static cache
    ids = some_ids(LENGTH)[:1]
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(exported_steps(model)(ids), expected, atol=1e-4, rtol=1e-4)
