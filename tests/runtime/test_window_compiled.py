"""Windowed models under torch.compile, with caches that grow and static ones."""

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

from support.memory_models import some_ids
from support.tiny_models import with_cache
from support.windowed_models import EVERY, MIXED, Pair

LENGTH = 14
PLANS = {"mixed": {0: MIXED[0], 1: MIXED[2]}, "every": {layer: EVERY[layer] for layer in range(2)}}


def made(plan):
    return Pair("llama", PLANS[plan], num_hidden_layers=2)


@pytest.mark.parametrize("dynamic", [None, True], ids=["found out", "dynamic"])
@pytest.mark.parametrize("prompt", [5, 9], ids=["short", "long"])
@torch.no_grad()
def test_a_growing_cache(prompt, dynamic):
    """A prompt into a new cache, then token by token: one graph each. After a short prompt windows are outgrown one by
    one; with sizes that are symbols no graph is for one length alone."""
    pair, ids, graphs = made("mixed"), some_ids(LENGTH), []

    def counted(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(pair.model.forward, backend=counted, fullgraph=True, dynamic=dynamic)
    cache, found = DynamicCache(config=pair.model.config), []
    for start, stop in ((0, prompt), *((at, at + 1) for at in range(prompt, LENGTH))):
        found.append(run(ids[:, start:stop], **with_cache(pair.model, cache)).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), pair.expected(ids), atol=1e-4, rtol=1e-4)
    if prompt > 7:  # all windows are outgrown
        assert len(graphs) <= 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_a_step_with_a_growing_cache_is_one_graph(mode):
    """After a prompt that nothing compiles. Slots are copied then: a graph cannot ask whether they may be written."""
    pair, ids = made("mixed"), some_ids(12)
    with mode():
        torch._dynamo.reset()
        step, cache = (
            torch.compile(pair.model.forward, backend="eager", fullgraph=True),
            DynamicCache(config=pair.model.config),
        )
        found = [pair.model(ids[:, :9], **with_cache(pair.model, cache)).logits]
        found += [step(ids[:, at : at + 1], **with_cache(pair.model, cache)).logits for at in range(9, 12)]
        expected = pair.expected(ids)
        torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_long_text_needs_no_more_graphs():
    """Not even as the first tokens leave for good, one window after the other: 6 and 4 tokens, and 32 for crops."""
    pair, ids, graphs = made("mixed"), some_ids(42), []

    def counted(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(pair.model.forward, backend=counted, fullgraph=True)
    cache = DynamicCache(config=pair.model.config)
    found = [pair.model(ids[:, :33], **with_cache(pair.model, cache)).logits]
    found += [step(ids[:, at : at + 1], **with_cache(pair.model, cache)).logits for at in range(33, 42)]
    torch.testing.assert_close(torch.cat(found, dim=1), pair.expected(ids), atol=1e-4, rtol=1e-4)
    assert len(graphs) == 2  # of one length, and of any
    cache.crop(-32)
    with pytest.raises(ValueError, match="tokens cannot be taken back"):
        cache.crop(-1)


@pytest.mark.parametrize("dynamic", [None, True], ids=["found out", "dynamic"])
@torch.no_grad()
def test_a_prompt_into_a_static_cache(dynamic):
    pair, ids, graphs = made("mixed"), some_ids(12), []

    def counted(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(pair.model, backend=counted, fullgraph=True, dynamic=dynamic)
    cache = StaticCache(pair.model.config, 16)
    found = [run(ids[:, :9], **with_cache(pair.model, cache)).logits]
    found += [run(ids[:, at : at + 1], **with_cache(pair.model, cache)).logits for at in range(9, 12)]
    torch.testing.assert_close(torch.cat(found, dim=1), pair.expected(ids), atol=1e-4, rtol=1e-4)
    assert len(graphs) == 2


def test_generate_compiles_each_step_as_one_graph():
    """As it does on a graphics card: with a static cache, the prompt as it is, and every token by one graph."""
    pair, ids, graphs = made("mixed"), some_ids(5), []

    def counted(graph, _):
        graphs.append(graph)
        return graph.forward

    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    compiled = CompileConfig(fullgraph=True, backend=counted, mode=None)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    found = pair.model.generate(ids, cache_implementation="static", compile_config=compiled, **options)
    assert torch.equal(found, pair.model.generate(ids, use_cache=False, **options))
    assert len(graphs) == 1


@torch.no_grad()
def test_masks_by_kind_of_layer():
    """As `generate` hands them to a compiled step of models some of whose layers have windows of their own."""
    pair, ids, room = Pair("gemma3_text", MIXED, sliding_window=64), some_ids(12), 20
    torch._dynamo.reset()
    step, cache = (
        torch.compile(pair.model.forward, backend="eager", fullgraph=True),
        StaticCache(pair.model.config, room),
    )
    found = [pair.model(ids[:, :9], **with_cache(pair.model, cache)).logits]
    for at in range(9, 12):
        mask = (torch.arange(room) <= at).expand(2, 1, 1, room)
        masks = {"full_attention": mask, "sliding_attention": mask}
        found.append(step(ids[:, at : at + 1], attention_mask=masks, **with_cache(pair.model, cache)).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), pair.expected(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_prompts(plan):
    """Prompts of several lengths, without a cache, as one graph each or fewer."""
    pair = made(plan)
    torch._dynamo.reset()
    run = torch.compile(pair.model.forward, backend="eager", fullgraph=True)
    for length in (4, 12, 30):
        ids = some_ids(length)
        torch.testing.assert_close(run(ids, use_cache=False).logits, pair.expected(ids), atol=1e-4, rtol=1e-4)


def test_training_as_one_graph():
    pair, ids = made("mixed"), some_ids(30)
    torch._dynamo.reset()
    run = torch.compile(pair.model.forward, backend="aot_eager", fullgraph=True)
    pair.model.zero_grad()
    run(ids, labels=ids, use_cache=False).loss.backward()
    found = {name: parameter.grad for name, parameter in pair.model.named_parameters()}
    pair.base.zero_grad()
    with pair.forced():
        pair.base(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in pair.base.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-4, rtol=1e-3, msg=name)
