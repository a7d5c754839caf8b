"""Folders with windows under other libraries: adapters, placement, Trainer's checkpointing; saved and loaded again."""

import os
import subprocess
import sys

import pytest
import torch

from sa_convert.families.table import FAMILIES
from support.forced_rows import forced_rows
from support.memory_models import some_ids
from support.planned_folders import convert_by_plan, told, windows_for
from support.tiny_models import attentions_of, geometry_of_folder, load_converted, save_tiny

LENGTH = 24
PLACES = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
PLACES |= {f"model.layers.{layer}": "disk" if layer in (2, 5) else "cpu" for layer in range(6)}
OPTIONS = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}


class Windowed:
    """A base, its folder with windows, and logits (B, T, V) that the base gives under them."""

    def __init__(self, root):
        self.base = save_tiny("llama", root / "base")
        self.windows = windows_for(geometry_of_folder(root / "base"))
        self.folder = convert_by_plan(root / "base", told(self.windows), root / "out")

    def forced(self, base):
        return forced_rows(attentions_of(base, FAMILIES["llama"]), self.windows, 4)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    return Windowed(tmp_path_factory.mktemp("windowed"))


def trained(model, ids, steps=2):
    """Losses of some steps over all parameters that are trained."""
    losses, optimizer = [], torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.05)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def test_lora(windowed, tmp_path):
    """An adapter on all projections trains as on the base under these windows, loads again, and merges."""
    from peft import LoraConfig, PeftModel, get_peft_model

    ids, config = some_ids(LENGTH), {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    torch.manual_seed(2)
    ours = get_peft_model(load_converted(windowed.folder), LoraConfig(**config))
    torch.manual_seed(2)
    theirs = get_peft_model(load_base(windowed), LoraConfig(**config))
    losses = trained(ours, ids)
    with windowed.forced(theirs.get_base_model()):
        assert losses == pytest.approx(trained(theirs, ids), rel=1e-4)
    assert losses[1] < losses[0]
    ours.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_converted(windowed.folder), tmp_path / "adapter").eval()
    expected = ours.generate(input_ids=ids, **OPTIONS)
    assert torch.equal(again.generate(input_ids=ids, **OPTIONS), expected)
    ours.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert torch.equal(load_converted(tmp_path / "merged").generate(ids, **OPTIONS), expected)


def load_base(windowed):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(windowed.folder.parent / "base", attn_implementation="eager").eval()


def test_training_with_checkpointing(windowed):
    """Two steps of every parameter, layers computed twice: the losses of the base under these windows."""
    ids, ours, theirs = some_ids(LENGTH), load_converted(windowed.folder), load_base(windowed)
    ours.gradient_checkpointing_enable()
    losses = trained(ours, ids, 3)
    with windowed.forced(theirs):
        assert losses == pytest.approx(trained(theirs, ids, 3), rel=1e-4)


def test_dispatched_by_accelerate(windowed, tmp_path):
    """Some layers on the disk, hooks around every module, and a device map from transformers."""
    from accelerate import cpu_offload
    from transformers import AutoModelForCausalLM

    ids = some_ids(LENGTH)
    with torch.no_grad(), windowed.forced(windowed.base):
        expected = windowed.base.generate(ids, use_cache=False, **OPTIONS)
    plain = load_converted(windowed.folder)
    for placed in (
        cpu_offload(load_converted(windowed.folder), execution_device="cpu"),
        AutoModelForCausalLM.from_pretrained(windowed.folder, trust_remote_code=True, device_map="auto"),
        AutoModelForCausalLM.from_pretrained(
            windowed.folder,
            trust_remote_code=True,
            device_map=PLACES,
            offload_folder=tmp_path / "some",
        ),
    ):
        assert torch.equal(placed.eval().generate(ids, **OPTIONS), expected)
    assert torch.equal(plain.generate(ids, **OPTIONS), expected)


SAVE = """
import sys, torch
sys.modules["sa_convert"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model.save_pretrained(sys.argv[2], max_shard_size="50KB")
"""


def test_saved_again_where_sa_convert_is_not(windowed, tmp_path):
    """The code files are written again, and the folder that they make says the same."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", SAVE, windowed.folder, tmp_path / "one"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = load_converted(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    for name in ("one", "two"):
        files = {path.name for path in windowed.folder.glob("*.py")}
        assert {path.name for path in (tmp_path / name).glob("*.py")} == files
        for file in files:
            assert (tmp_path / name / file).read_bytes() == (windowed.folder / file).read_bytes()
        ids, before, after = some_ids(LENGTH), load_converted(windowed.folder), load_converted(tmp_path / name)
        assert after.config.shared_attention == before.config.shared_attention
        assert torch.equal(after.generate(ids, **OPTIONS), before.generate(ids, **OPTIONS))
