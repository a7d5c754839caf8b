"""Two processes give what one gives: with DDP, and with FSDP2, which hold a part of the weights each."""

import pytest

from support.healing_models import all_tensors, damaged_conversion, heal_launched
from support.processes import run_cli

OPTIONS = ("--tokens", "4k", "--length", "64", "--rate", "1e-3", "--rows", "4", "--no-validate")
FSDP = """distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: false
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_reshard_after_forward: true"""
# accelerate takes FSDP for accelerators only, though torch shards on CPUs, too. What follows is all that it takes.
ON_CPUS = """
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

first = AcceleratorState.__init__

def told(self, *arguments, fsdp_plugin=None, **named):
    first(self, *arguments, fsdp_plugin=fsdp_plugin, **named)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

AcceleratorState.__init__ = told
"""
CHECKED = """
import os
import torch
from sa_convert.heal.healing_trainer import Judging

begin = Judging.on_train_begin

def checked(self, args, *others, **named):
    begin(self, args, *others, **named)
    kind = type(self.trainer.model_wrapped).__name__
    os.write(1, f"WRAPPED {kind} {args.world_size}\\n".encode())  # at once: two processes write to one pipe

Judging.on_train_begin = checked
"""
START = "\nfrom sa_convert.commands.main import main\nmain()\n"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The conversion, and the weights that one process makes of it."""
    damaged = damaged_conversion(tmp_path_factory.mktemp("heal"))
    out = damaged.folder.parent / "alone"
    done = run_cli("heal", damaged.folder, "--against", damaged.base, "-o", out, *OPTIONS)
    assert done.returncode == 0, done.stderr
    return damaged, all_tensors(out)


@pytest.mark.parametrize(
    ("content", "prelude", "kind"),
    [("distributed_type: MULTI_GPU", "", "DistributedDataParallel"), (FSDP, ON_CPUS, "FSDPDistilled")],
    ids=["ddp", "fsdp2"],
)
def test_two_processes_give_what_one_gives(alone, tmp_path, content, prelude, kind):
    damaged, expected = alone
    program = tmp_path / "program.py"
    program.write_text(prelude + CHECKED + START)
    out = tmp_path / "out"
    done = heal_launched(
        tmp_path / "config.yaml",
        content,
        program,
        "heal",
        damaged.folder,
        "--against",
        damaged.base,
        "-o",
        out,
        *OPTIONS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"WRAPPED {kind} 2") == 2
    assert done.stdout.count("Written to") == 1
    before, found = all_tensors(damaged.folder), all_tensors(out)
    moved = max(float((expected[name] - before[name]).abs().max()) for name in expected)
    off = max(float((expected[name] - found[name]).abs().max()) for name in expected)
    assert moved > 1e-3
    assert off < 1e-5
