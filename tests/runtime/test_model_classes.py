"""What transformers, torch and peft do for a model by its class: a converted class is treated as its base's."""

import copy
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from support.memory_models import GROUP, HEADS, MIXED, WHOLE, in_memory, some_ids
from support.processes import ROOT

DECODERS = {f"decoder.{layer}": row for layer, row in MIXED.items()}
CROSS = {"decoder.cross.1": WHOLE}


def in_new_process(program, *arguments):
    """The words that a program prints, which may import the tests' modules."""
    path = (ROOT, ROOT / "tests", Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    if inherited := os.environ.get("PYTHONPATH"):
        environment["PYTHONPATH"] += os.pathsep + inherited
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("adapted", [False, True])
def test_label_smoothing_shifts_the_labels_of_causal_models(tmp_path, model_type, adapted):
    # Layers 0 and 1 are of one kind in each of them.
    model, ids = in_memory(model_type, {"1": HEADS}), some_ids()
    logits = model(ids).logits.detach()
    if adapted:  # of no effect yet
        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    arguments = transformers.TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    trainer = transformers.Trainer(model, arguments)
    with torch.no_grad():
        found = trainer.compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("model_type", "layers"), [("bert", MIXED), ("t5", CROSS), ("bart", CROSS)])
def test_label_smoothing_leaves_other_labels_where_they_are(tmp_path, model_type, layers):
    model, ids = in_memory(model_type, layers), some_ids()
    arguments = transformers.TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    trainer = transformers.Trainer(model, arguments)
    with torch.no_grad():
        given = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
        found = trainer.compute_loss(model, {**given, "labels": ids.clone()})
        logits = model(**given).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "olmoe", "ernie4_5_moe", "llama4_text"])
def test_experts_run_together_whichever_class_was_asked_first(model_type):
    """The base's class is asked after ours, in a new process: its answer is kept for classes that derive from it."""
    program = """
        import sys, torch
        from support.memory_models import in_memory, some_ids, WHOLE
        # Layers of gpt_oss alternate: the third is the first that may reuse another.
        model = in_memory(sys.argv[1], {"2" if sys.argv[1] == "gpt_oss" else "1": WHOLE})
        base = in_memory(sys.argv[1], None)
        print(model.config._experts_implementation, base.config._experts_implementation)
        for name in ("eager", base.config._experts_implementation):
            model.set_experts_implementation(name)
            assert model.config._experts_implementation == name
        print(model._can_set_attn_implementation(), base._can_set_attn_implementation())
        if base.config._experts_implementation != "eager":
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            with torch.no_grad():
                result, expected = (run(input_ids=some_ids(9), use_cache=False).logits for run in (compiled, model))
            torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    """
    ours, theirs, attention, base_attention = in_new_process(program, model_type)
    assert ours == theirs
    assert attention == base_attention


@pytest.mark.parametrize("model_type", ["falcon", "llama", "bert"])
def test_attention_can_be_set_as_far_as_in_the_base(model_type):
    program = """
        import sys
        from support.memory_models import in_memory
        print(*(in_memory(sys.argv[1], layers)._can_set_attn_implementation() for layers in ({}, None)))
    """
    ours, theirs = in_new_process(program, model_type)
    assert ours == theirs


@pytest.mark.parametrize(
    ("model_type", "layers"),
    [
        ("llama", MIXED),
        ("gpt2", MIXED),
        ("qwen2_moe", MIXED),
        ("bert", MIXED),
        ("t5", DECODERS | CROSS),
        ("bart", CROSS),
    ],
)
def test_models_are_pickled_and_copied(tmp_path, model_type, layers):
    model, ids = in_memory(model_type, layers), some_ids()
    torch.save(model, tmp_path / "model.pt")
    given = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        expected = model(**given).logits
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        copied = copy.deepcopy(model)
        for other in (loaded, copied):
            assert type(other) is type(model)
            torch.testing.assert_close(other(**given).logits, expected, atol=1e-5, rtol=0)
        next(iter(copied.parameters())).add_(1.0)
        torch.testing.assert_close(model(**given).logits, expected, atol=1e-5, rtol=0)
        torch.save(expected, tmp_path / "expected.pt")
    program = """
        import sys, torch
        from support.memory_models import some_ids
        model, ids = torch.load(sys.argv[1] + "/model.pt", weights_only=False), some_ids()
        given = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
        with torch.no_grad():
            found, expected = model(**given).logits, torch.load(sys.argv[1] + "/expected.pt")
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        print(type(model).__name__)
    """
    assert in_new_process(program, tmp_path) == [type(model).__name__]


@pytest.mark.parametrize("model_type", ["t5", "mt5", "mbart", "pegasus", "blenderbot", "m2m_100", "bart", "marian"])
def test_every_parameter_of_a_reusing_cross_attention_has_a_gradient(tmp_path, model_type):
    model, ids = in_memory(model_type, CROSS), some_ids()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=0, rtol=0)
    base = in_memory(model_type, None)
    base.save_pretrained(tmp_path / "base")
    # What is loaded is compared with what is loaded: positions that do not train come back as if they did.
    loaded_base = type(base).from_pretrained(tmp_path / "base").eval()
    for trained, control in ((model, base), (loaded.eval(), loaded_base)):
        trained(input_ids=ids, labels=ids).loss.backward()
        unread = [name for name, tensor in trained.named_parameters() if tensor.grad is None]
        control(input_ids=ids, labels=ids).loss.backward()
        assert unread == [name for name, tensor in control.named_parameters() if tensor.grad is None]


@pytest.mark.parametrize("model_type", ["t5", "mt5", "bart"])
@pytest.mark.parametrize("offloaded", ["encoder", "decoder"])
def test_blocks_lie_on_the_disk(tmp_path, model_type, offloaded):
    row = [None, *WHOLE[1:]]
    model, ids = in_memory(model_type, {"encoder.1": row, "decoder.1": row}), some_ids()
    model.save_pretrained(tmp_path / "model")
    inner = "model." if model_type == "bart" else ""
    layers = {"bart": "layers"}.get(model_type, "block")
    places = {name: "cpu" for name, module in model.named_modules() if not next(module.children(), None)}
    places |= dict.fromkeys(model.state_dict(), "cpu")
    within = f"{inner}{offloaded}.{layers}"
    places = {name: place for name, place in places.items() if not name.startswith(within)} | {within: "disk"}
    placed = type(model).from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
    given = {"input_ids": ids, "decoder_input_ids": ids}
    with torch.no_grad():
        torch.testing.assert_close(placed(**given).logits, model(**given).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "depth"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer"), ("bert", "num_hidden_layers")]
)
@pytest.mark.parametrize("kept", [1, 3])
def test_the_first_layers_alone(tmp_path, model_type, depth, kept):
    model, ids = in_memory(model_type), some_ids()
    model.save_pretrained(tmp_path)
    first = type(model).from_pretrained(tmp_path, **{depth: kept}).eval()
    with torch.no_grad():
        # The states after the last layer kept: the last ones are normalised.
        found = first(ids, output_hidden_states=True).hidden_states[:kept]
        expected = model(ids, output_hidden_states=True).hidden_states[:kept]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert len(first(ids, output_hidden_states=True).hidden_states) == kept + 1


@pytest.mark.parametrize(
    ("model_type", "mapping"),
    [
        ("llama", "MODEL_FOR_CAUSAL_LM_MAPPING"),
        ("bert", "MODEL_FOR_MASKED_LM_MAPPING"),
        ("gemma3_text", "MODEL_MAPPING"),
        ("t5", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    ],
)
def test_classes_in_the_mappings_of_transformers_are_used_as_classes(model_type, mapping):
    program = """
        import sys, sa_convert, transformers
        from support.memory_models import in_memory
        config = in_memory(sys.argv[1], {}).config
        found = getattr(transformers, sys.argv[2])[type(config)]
        model = found(config)
        assert isinstance(model, found) and issubclass(type(model), found) and not isinstance(config, found)
        assert found.__name__ == type(model).__name__

        class Mine(found):
            def __init__(self, config):
                super().__init__(config)
                self.mine = True

        mine = Mine(config)
        assert mine.mine and isinstance(mine, type(model)) and isinstance(mine, found)
        assert type("Other", (found,), {})(config).config is config
        print(Mine.__name__, found.base_class.__name__)
    """
    name, base = in_new_process(program, model_type, mapping)
    assert name == "Mine"
    assert hasattr(transformers, base)


@pytest.mark.parametrize(
    ("model_type", "layers", "targets", "layer"),
    [
        ("llama", {"1": GROUP}, ["q_proj", "v_proj"], 1),
        ("llama", {"2": WHOLE}, ["q_proj", "v_proj"], 2),
        ("gpt2", {"3": HEADS}, ["c_attn"], 3),
        ("bert", {"1": HEADS}, ["query", "value"], 1),
    ],
)
def test_adapters_of_the_base_that_do_not_fit_are_refused_in_a_sentence(tmp_path, model_type, layers, targets, layer):
    adapted = get_peft_model(in_memory(model_type, None), LoraConfig(target_modules=targets))
    adapted.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError) as caught:
        PeftModel.from_pretrained(in_memory(model_type, layers), tmp_path)
    message = str(caught.value)
    assert f"does not fit: layer {layer} reuses attention, so it lacks queries and keys" in message
    assert "Train an adapter on the converted model" in message
    assert message.count("does not fit") == 1
    assert "size mismatch" not in message


@pytest.mark.parametrize(("model_type", "targets"), [("llama", ["v_proj", "o_proj"]), ("bert", ["value"])])
def test_adapters_of_the_base_that_fit_load(tmp_path, model_type, targets):
    adapted = get_peft_model(in_memory(model_type, None), LoraConfig(target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(in_memory(model_type), tmp_path)
    expected = dict(adapted.named_parameters())
    found = {name: tensor for name, tensor in loaded.named_parameters() if "lora_" in name}
    assert found
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=0, rtol=0)


def _parallel(rank, port, folders, results):
    """One process of two, which share a model between them: the difference to the model of one process, and the
    projections of attention that are whole in each."""
    import torch.distributed as dist
    from transformers.distributed.configuration_utils import DistributedConfig

    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="localhost", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    ids = some_ids(16)
    for name, folder in folders.items():
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(folder, distributed_config=DistributedConfig(tp_size=2)).eval()
        with torch.no_grad():
            difference = (model(ids).logits - load(folder).eval()(ids).logits).abs().max().item()
        projections = [tensor for key, tensor in model.named_parameters() if re.search(r"self_attn\.\w+_proj", key)]
        whole = sum(not hasattr(tensor, "placements") for tensor in projections)
        results[name, rank] = difference, whole, len(projections)
        dist.barrier()
    dist.destroy_process_group()


PERMUTED = [[0, 7 - head] for head in range(8)]


def test_tensor_parallelism(tmp_path):
    """Spans are divided as the base is; other maps leave attention whole. Both give the logits of one process."""
    maps = {"span": {"1": WHOLE}, "permuted": {"1": PERMUTED}, "heads": {"1": GROUP, "2": HEADS}}
    folders = {}
    for model_type in ("llama", "qwen3", "phi3", "mixtral"):
        for name, layers in maps.items():
            model = in_memory(model_type, layers)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            folders[f"{model_type}-{name}"] = str(tmp_path / f"{model_type}-{name}")
            model.save_pretrained(folders[f"{model_type}-{name}"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    program = """
        import json, sys, sa_convert, torch.multiprocessing as mp
        from test_model_classes import _parallel
        results = mp.Manager().dict()
        mp.start_processes(_parallel, (sys.argv[1], json.loads(sys.argv[2]), results), 2, start_method="fork")
        for (name, rank), found in dict(results).items():
            print(name, *found)
    """
    words = in_new_process(program, port, json.dumps(folders))
    rows = list(zip(*(words[start::4] for start in range(4)), strict=True))
    assert len(rows) == 2 * len(folders)
    for name, difference, whole, of in rows:
        assert float(difference) < 1e-3, name
        divided = name.endswith("-span") and not name.startswith("phi3")  # whose projections are fused
        assert int(whole) == (0 if divided else int(of)), name
