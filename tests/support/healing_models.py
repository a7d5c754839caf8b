"""A tiny conversion that was damaged on purpose, so that healing has something to do."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.cli_cases import SPAN
from support.processes import ROOT, run_cli
from support.tiny_models import save_tiny, save_tokenizer, write_recipe

DAMAGED = "model.layers.3.self_attn.o_proj.weight"
QUICK = ("--tokens", "12k", "--length", "64", "--rate", "5e-3")
"""Options of a run of some seconds."""


@dataclass(frozen=True)
class Damaged:
    """base: the base's folder. folder: the conversion's."""

    base: Path
    folder: Path


def damaged_conversion(root: Path, **changes) -> Damaged:
    """A Llama whose layer 3 borrows layer 2's attention, and has lost most of its output projection."""
    save_tiny("llama", root / "base", **changes)
    save_tokenizer(root / "base")
    recipe = write_recipe(root / "span.json", SPAN, gate={"max_perplexity_increase": "90%"})
    done = run_cli("convert", root / "base", "--recipe", recipe, "-o", root / "out", "--no-validate")
    assert done.returncode == 0, done.stderr
    damage(root / "out")
    return Damaged(root / "base", root / "out")


def damage(folder: Path) -> None:
    """A tenth is left of the output projection of layer 3, and noise is added."""
    file = next(file for file in sorted(folder.glob("*.safetensors")) if DAMAGED in names_in(file))
    tensors = load_file(file)
    noise = torch.randn(tensors[DAMAGED].shape, generator=torch.Generator().manual_seed(3))
    tensors[DAMAGED] = 0.1 * tensors[DAMAGED] + 0.1 * noise
    save_file(tensors, file, metadata={"format": "pt"})


def names_in(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """By name, of all files of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def header(file: Path) -> bytes:
    """Of a safetensors file: names, dtypes, shapes and offsets."""
    content = file.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def heal_process(*arguments: object, prelude: str | None = None, **options: Any) -> subprocess.Popen:
    """`sa-convert heal` as a process that a test may interrupt. prelude: Python code that runs first."""
    program = f"{prelude or ''}\nfrom sa_convert.commands.main import main\nmain()\n"
    command = [sys.executable, "-c", program, "heal", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def heal_launched(
    config: Path, content: str, program: Path, *arguments: object, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """The program with these arguments by `accelerate launch` with two processes on the CPU.

    config: file for accelerate's configuration, whose further lines are `content`.
    """
    config.write_text(
        "compute_environment: LOCAL_MACHINE\nnum_processes: 2\nnum_machines: 1\nmachine_rank: 0\n"
        f"mixed_precision: 'no'\nuse_cpu: false\nmain_process_port: 0\n{content}\n"
    )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), str(program)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", **(env or {})}
    return subprocess.run(
        [*launcher, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300
    )
