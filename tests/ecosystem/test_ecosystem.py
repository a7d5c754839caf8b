"""What people do with a model after it is loaded, with other libraries: pipelines, adapters, quantisation, lm_eval.

Each result is compared with the same model without the library, or with a computation of our own.
"""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch

from support.processes import run_cli
from support.tiny_models import load_converted, save_tiny, save_tokenizer, write_recipe

# Layer 3 reuses as a whole, layer 4 in two of its four KV groups.
ROWS = {
    3: [[2, head] for head in range(8)],
    4: [[0, 1], [0, 2], None, None, [1, 5], [1, 6], None, None],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("ecosystem")
    # Blocks of 4-bit quantisation have 64 weights.
    save_tiny("llama", root / "base", intermediate_size=128)
    save_tokenizer(root / "base")
    recipe = write_recipe(root / "recipe.json", ROWS)
    result = run_cli("convert", root / "base", "--recipe", recipe, "-o", root / "out", "--no-validate")
    assert result.returncode == 0, result.stderr
    return root / "out"


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(3, 110, (2, 24))


@torch.no_grad()
def logits_of(model, ids):
    return model(ids, use_cache=False).logits


def test_pipeline(folder):
    from transformers import AutoTokenizer, pipeline

    generate = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    prompts = ["forty words", "The quick brown fox jumps over"]
    found = generate(prompts, max_new_tokens=8, do_sample=False, return_full_text=False)
    model, tokenizer = load_converted(folder), AutoTokenizer.from_pretrained(folder)
    for prompt, [result] in zip(prompts, found, strict=True):
        start = tokenizer(prompt, return_tensors="pt").input_ids
        tokens = model.generate(start, max_new_tokens=8, do_sample=False)[0, start.shape[1] :]
        assert result["generated_text"] == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("layer", [3, 4], ids=["whole layer", "some groups"])
def test_lora_on_a_reusing_layer(folder, ids, tmp_path, layer):
    """Values and outputs of a reusing layer are trained; the adapter loads again, and merges into the weights."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(2)
    before = load_converted(folder)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "o_proj"], "layers_to_transform": [layer]}
    model = get_peft_model(load_converted(folder), LoraConfig(**options))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 4
    start = copy.deepcopy(trained)
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    losses = []
    model.train()
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert all(not torch.equal(old, new) for old, new in zip(start, trained, strict=True))

    adapted = logits_of(model.eval(), ids)
    assert (adapted - logits_of(before, ids)).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_converted(folder), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(again, ids), adapted)

    name = f"model.layers.{layer}.self_attn.v_proj"
    lora = model.get_submodule(f"base_model.model.{name}")
    update = 2 * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    expected = before.get_submodule(name).weight + update
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = load_converted(tmp_path / "merged")
    torch.testing.assert_close(merged.get_submodule(name).weight, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(logits_of(merged, ids), adapted, atol=1e-4, rtol=1e-4)
    assert merged.config.shared_attention == before.config.shared_attention


def rounded_weight(module):
    """The weight that a layer of bitsandbytes stands for."""
    from bitsandbytes.functional import dequantize_4bit

    weight = module.weight
    if hasattr(weight, "quant_state"):
        return dequantize_4bit(weight.data, weight.quant_state)
    return weight.CB.float() * weight.SCB[:, None] / 127


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_few_bits(folder, ids, bits):
    """bitsandbytes on the CPU: the model with its rounded weights, up to the precision of the library's kernels."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, quantization_config=config, device_map="cpu"
    ).eval()
    plain = load_converted(folder)
    rounded = copy.deepcopy(plain)
    names = [name for name, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)]
    assert {"model.layers.3.self_attn.v_proj", "model.layers.4.self_attn.q_proj"} < set(names)
    for name in names:
        with torch.no_grad():
            rounded.get_submodule(name).weight.copy_(rounded_weight(model.get_submodule(name)))
    found = logits_of(model, ids)

    def error(reference):
        expected = logits_of(reference, ids)
        return float((found - expected).norm() / expected.norm())

    assert error(rounded) < 0.03
    assert error(plain) > (0.1 if bits == 4 else 0.005)
    cached = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))


TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
QUESTIONS = [
    {"context": "The quick brown fox jumps over the lazy", "choices": ["dog", "fox"], "label": 0},
    {"context": "while forty words of English are", "choices": ["lazy", "counted here"], "label": 1},
]


@torch.no_grad()
def log_likelihood(model, tokenizer, context, choice):
    start = tokenizer(context).input_ids
    whole = tokenizer(f"{context} {choice}").input_ids
    log_probabilities = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(log_probabilities[at - 1, whole[at]]) for at in range(len(start), len(whole)))


def test_lm_eval(folder, tmp_path):
    """A multiple-choice task of our own, run as users do; its log-likelihoods are those of the loaded model."""
    pytest.importorskip("lm_eval", reason="heavy: pip install lm_eval")
    from transformers import AutoTokenizer

    data = tmp_path / "words.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "words.yaml").write_text(TASK.format(data=data))
    arguments = [
        "--model", "hf", "--model_args", f"pretrained={folder},trust_remote_code=True", "--tasks", "words",
        "--include_path", tmp_path, "--device", "cpu", "--output_path", tmp_path / "results", "--log_samples",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    command = [sys.executable, "-m", "lm_eval", *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    [samples] = (tmp_path / "results").rglob("samples_words_*.jsonl")
    found = {sample["doc_id"]: sample for sample in map(json.loads, samples.read_text().splitlines())}
    model, tokenizer = load_converted(folder), AutoTokenizer.from_pretrained(folder)
    best = []
    for number, question in enumerate(QUESTIONS):
        own = [log_likelihood(model, tokenizer, question["context"], choice) for choice in question["choices"]]
        assert [float(response[0]) for response in found[number]["filtered_resps"]] == pytest.approx(own, rel=1e-4)
        best.append(own.index(max(own)) == question["label"])
    [results] = (tmp_path / "results").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["words"]["acc,none"] == sum(best) / len(best)
