"""How loans travel: full graphs, threads, models in hooks, checkpointing by wrappers, and layers that tools replay.

Models are made in memory: nothing here depends on files.
"""

import copy
import threading
from functools import partial

import pytest
import torch
import transformers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from sa_convert.runtime.modeling_shared_attention import TreatedAttention
from support.memory_models import MIXED, in_memory, inputs, made, some_ids

# Families whose forward passes no keyword on, one or more of each kind of forward; and two of the other ways.
BY_THREAD = ["bert", "roberta", "electra", "falcon", "bloom", "gptj", "xglm", "trocr", "t5", "mt5", "bart", "pegasus"]
OTHERS = ["llama", "persimmon", "gemma2"]


@pytest.mark.parametrize("model_type", BY_THREAD + OTHERS)
@torch.no_grad()
def test_one_graph(model_type):
    model = made(model_type)
    given = inputs(model)
    expected = model(**given).logits
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    logits = torch.compile(model, backend="eager", fullgraph=True)(**given).logits
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("llama", "LlamaModel"),
        ("gpt2", "GPT2Model"),
        ("qwen2_moe", "Qwen2MoeModel"),  # beside positions
        ("bert", "BertModel"),  # by thread
        ("falcon", "FalconModel"),
        ("t5", "T5EncoderModel"),
    ],
)
def test_forward_may_be_called_directly(model_type, architecture):
    """As sentence-transformers does: hooks of the model do not run then."""
    layers = {f"encoder.{layer}": row for layer, row in MIXED.items()} if model_type == "t5" else MIXED
    model, ids = in_memory(model_type, layers, architecture), some_ids()
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        assert torch.equal(model.forward(ids).last_hidden_state, expected)
        assert torch.equal(copy.deepcopy(model).forward(ids).last_hidden_state, expected)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)(input_ids=ids).last_hidden_state
    torch.testing.assert_close(compiled, expected, atol=1e-4, rtol=1e-4)
    model.train()
    model.gradient_checkpointing_enable()
    model.forward(ids).last_hidden_state.square().sum().backward()
    assert not [name for name, tensor in model.named_parameters() if "layer" in name and tensor.grad is None]


@pytest.mark.parametrize("model_type", ["bert", "falcon", "bart"])
@torch.no_grad()
def test_export(model_type):
    model = made(model_type)
    given = {**inputs(model), **({} if model_type == "bert" else {"use_cache": False})}
    program = torch.export.export(model, (), given)
    other = {**given, **inputs(model, seed=2)}
    torch.testing.assert_close(program.module()(**other).logits, model(**other).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("model_type", ["bert", "gptj", "t5"])
def test_threads_do_not_meet(model_type, compiled):
    model = made(model_type)
    run = torch.compile(model, backend="eager") if compiled else model
    given = [inputs(model, seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [model(**each).logits for each in given]
        run(**given[0])
    wrong, gate = [], threading.Barrier(len(given))

    def work(number):
        gate.wait()
        for _ in range(6):
            with torch.no_grad():
                if not torch.allclose(run(**given[number]).logits, expected[number], atol=1e-4):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def failing(model):
    """A hook that raises within the last attention module of a model."""
    last = [module for module in model.modules() if isinstance(module, TreatedAttention)][-1]

    def fail(*_):
        raise ZeroDivisionError

    return last.register_forward_pre_hook(fail)


@pytest.mark.parametrize("inner_type", ["bert", "falcon", "bart", "same"])
@torch.no_grad()
def test_a_model_in_a_hook(inner_type):
    """Another such model, or the same one, runs between two layers of a model; once to its end, once to an error."""
    model = made("bert")
    inner = model if inner_type == "same" else made(inner_type, seed=3)
    given, other = inputs(model), inputs(inner, length=5)
    expected, inner_expected = model(**given).logits, inner(**other).logits
    found = []

    def run_inner(*_):
        if len(found) == 0:
            found.append(None)  # the same model comes by here again
            found[0] = inner(**other).logits

    def run_failing(*_):
        if len(found) == 1:
            found.append(None)
            hook = failing(inner)
            with pytest.raises(ZeroDivisionError):
                inner(**other)
            hook.remove()

    model.bert.encoder.layer[0].register_forward_hook(run_inner)
    model.bert.encoder.layer[1].register_forward_hook(run_failing)
    torch.testing.assert_close(model(**given).logits, expected)
    assert len(found) == 2
    torch.testing.assert_close(found[0], inner_expected)


def gradients(model, given):
    model.train().zero_grad()
    torch.manual_seed(5)  # of dropout
    keywords = {} if model.config.model_type.endswith("bert") else {"use_cache": False}
    model(**given, **keywords).logits.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def without_wrapper(name):
    return name.replace("_checkpoint_wrapped_module.", "")


def is_layer(module):
    return isinstance(module, transformers.modeling_layers.GradientCheckpointingLayer)


@pytest.mark.parametrize("part", ["layer", "attention", "enabled"])
@pytest.mark.parametrize("model_type", ["bert", "falcon", "bloom", "gptj", "t5", "bart", "llama", "persimmon"])
def test_checkpointing_by_wrappers(model_type, part):
    """torch's checkpoint_wrapper, as FSDP's recipes apply it, around layers or around attention modules alone; and
    what transformers itself enables."""
    plain = made(model_type)
    given = inputs(plain)
    expected = gradients(plain, given)
    model = copy.deepcopy(plain)
    calls = []
    for module in model.modules():
        if isinstance(module, TreatedAttention):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    if part == "enabled":
        model.gradient_checkpointing_enable()
    else:
        wrap = partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
        chosen = is_layer if part == "layer" else lambda module: isinstance(module, TreatedAttention)
        apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=chosen)
    found = {without_wrapper(name): gradient for name, gradient in gradients(model, given).items()}
    attentions = sum(isinstance(module, TreatedAttention) for module in model.modules())
    assert len(calls) == 2 * attentions, "every attention module should be computed twice"
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("model_type", ["bert", "falcon", "t5", "llama"])
def test_reentrant_wrappers_are_told(model_type):
    model = made(model_type)
    wrap = partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT)
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=is_layer)
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    with pytest.raises(RuntimeError, match=r"shared_attention: .*use_reentrant=False"):
        gradients(model, inputs(model))


@pytest.mark.parametrize("model_type", ["bert", "falcon", "llama"])
def test_a_pass_without_backward_leaves_nothing(model_type):
    """What layers keep for being computed again does not keep the graph alive: queries die with the outputs."""
    import gc
    import weakref

    model = made(model_type)
    seen = []
    for module in model.modules():
        if isinstance(module, TreatedAttention):
            module.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output[0])))
    model(**inputs(model))
    gc.collect()
    assert seen
    assert not any(reference() is not None for reference in seen)


class Caught(Exception):
    pass


def catch(model, layers, samples):
    """What the first layer gets for every sample."""
    caught = []

    def stop(module, args, kwargs):
        caught.append((args, kwargs))
        raise Caught

    hook = layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    for sample in samples:
        with pytest.raises(Caught):
            model(sample, use_cache=False)
    hook.remove()
    return caught


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("model_type", ["llama", "persimmon", "stablelm", "gemma2"])
def test_replayed_layers(model_type, grad):
    """As GPTQ does: every layer runs on all samples, is changed, and runs on them again."""
    model = made(model_type)
    samples = [torch.randint(3, 128, (1, 7)) for _ in range(3)]  # no longer than windows: every layer gets one mask
    with torch.set_grad_enabled(grad):
        caught = catch(model, model.model.layers, samples)
        states = [args[0] for args, _ in caught]
        for layer in model.model.layers:
            for state, (_, kwargs) in zip(states, caught, strict=True):
                layer(state, **kwargs)
            for parameter in layer.parameters():
                parameter.data = (parameter.data * 32).round() / 32
            states = [first(layer(state, **kwargs)) for state, (_, kwargs) in zip(states, caught, strict=True)]
        norm = getattr(model.model, "norm", None) or model.model.final_layernorm
        for state, sample in zip(states, samples, strict=True):
            expected = model(sample, use_cache=False, output_hidden_states=True).hidden_states[-1]
            torch.testing.assert_close(norm(state), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "persimmon", "gemma2"])
@torch.no_grad()
def test_one_set_of_keywords_for_several_inputs_is_told(model_type):
    """Layer by layer over several samples, with keywords of the first alone: nothing says whose loan is meant."""
    model = made(model_type)
    samples = [torch.randint(3, 128, (1, 9)) for _ in range(3)]
    caught = catch(model, model.model.layers, samples)
    kwargs = caught[0][1]
    states = [first(model.model.layers[0](args[0], **kwargs)) for args, _ in caught]
    with pytest.raises(RuntimeError, match=r"shared_attention: layer 0 .* was replayed on several inputs"):
        model.model.layers[1](states[0], **kwargs)
    # Sample by sample it is clear.
    kwargs = caught[1][1]
    for args, _ in caught:
        states = args[0]
        for layer in model.model.layers[:2]:
            states = first(layer(states, **kwargs))


@pytest.mark.parametrize("model_type", ["falcon", "gptj", "xglm"])
@torch.no_grad()
def test_replaying_families_without_keywords_is_told(model_type):
    model = made(model_type)
    backbone = model.base_model.decoder if hasattr(model.base_model, "decoder") else model.base_model
    layers = backbone.h if hasattr(backbone, "h") else backbone.layers
    ((args, kwargs),) = catch(model, layers, [torch.randint(3, 128, (1, 9))])
    with pytest.raises(RuntimeError, match=r"shared_attention: .* run the whole model"):
        layers[0](*args, **kwargs)
