"""Windowed models under torch.compile, with caches that grow."""

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

from support.memory_models import some_ids
from support.tiny_models import with_cache
from support.windowed_models import EVERY, MIXED, Pair

LENGTH = 14
PLANS = {"mixed": {layer: MIXED[layer] for layer in (0, 2)}, "every": {layer: EVERY[layer] for layer in range(3)}}


def made(plan):
    return Pair("llama", PLANS[plan], num_hidden_layers=3)


@torch.no_grad()
def test_a_growing_cache():
    """A prompt, then token by token. It breaks into graphs, some of which torch gives up on: static caches have one."""
    pair, ids = made("mixed"), some_ids(LENGTH)
    torch._dynamo.reset()
    step, cache, found = torch.compile(pair.model.forward, backend="eager"), DynamicCache(config=pair.model.config), []
    for start, stop in ((0, 6), *((at, at + 1) for at in range(6, LENGTH))):
        found.append(step(ids[:, start:stop], **with_cache(pair.model, cache)).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), pair.expected(ids), atol=1e-4, rtol=1e-4)


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
def test_a_prompt_into_a_static_cache():
    """It breaks into graphs, for none can give a layer of the cache another class; the numbers are right."""
    pair, ids = made("mixed"), some_ids(12)
    torch._dynamo.reset()
    run, cache = torch.compile(pair.model, backend="eager"), StaticCache(pair.model.config, 16)
    found = [run(ids[:, :9], **with_cache(pair.model, cache)).logits]
    found += [run(ids[:, at : at + 1], **with_cache(pair.model, cache)).logits for at in range(9, 12)]
    torch.testing.assert_close(torch.cat(found, dim=1), pair.expected(ids), atol=1e-4, rtol=1e-4)


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
