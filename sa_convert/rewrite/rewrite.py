"""Writes a whole converted model, but for what validation and publishing add to it."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from sa_convert.console.progress import progress_bytes
from sa_convert.domain.checkpoint import Checkpoint, TensorEdit
from sa_convert.domain.plan import Plan
from sa_convert.domain.stock import StockForm, without_code
from sa_convert.families.family import Family
from sa_convert.rewrite.carried import TOKENIZERS, carried_files
from sa_convert.rewrite.config import classes_in, converted_config
from sa_convert.rewrite.processor import processor_configs
from sa_convert.rewrite.shards import Written, plan_shards, write_shards
from sa_convert.rewrite.tokenizer import FILE as TOKENIZER_CONFIG
from sa_convert.rewrite.tokenizer import as_json, tokenizer_code, tokenizer_config

_HEADROOM = 16 * 1024 * 1024
"""Bytes for configuration, code, index, report, model card and figures."""


def needed_bytes(checkpoint: Checkpoint, edits: Mapping[str, TensorEdit]) -> int:
    """Bytes of disk that `rewrite_checkpoint` and a report need."""
    weights = sum(plan.bytes for plan in plan_shards(checkpoint, edits))
    return weights + sum(checkpoint.size(path) for path in checkpoint.side_files) + _HEADROOM


def rewrite_checkpoint(
    checkpoint: Checkpoint,
    family: Family,
    plan: Plan,
    edits: Mapping[str, TensorEdit],
    folder: Path,
    *,
    runtimes: Mapping[str, Path],
    stock: StockForm | None = None,
) -> Written:
    """Write weights, index, configuration, code and side files of the converted model into `folder`, an empty folder.

    runtimes: the runtime file of each treatment that there is. stock: what a model is written as for an engine with a
    class of its own; if that needs no code, its tokenizer is the base's, whose class has to be told if the model's type
    is another one. Shows a progress bar.
    Raises CheckpointError if the base cannot be read, OSError if the result cannot be written; `staging` makes that an
    OutputError and removes what was written.
    """
    for path in (*checkpoint.side_files, *tokenizer_code(checkpoint)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.folder / path, folder / path)
    plain = without_code(stock)
    if plain is None or plain.model_type != family.model_type:
        tokenizer = tokenizer_config(checkpoint, family)
        if tokenizer is not None:
            (folder / TOKENIZER_CONFIG).write_text(as_json(tokenizer), encoding="utf-8")
            if TOKENIZERS.stem in str(tokenizer.get("auto_map")):
                shutil.copyfile(TOKENIZERS, folder / TOKENIZERS.name)
    if plain is None:
        for name, content in processor_configs(checkpoint, family).items():
            (folder / name).write_text(as_json(content), encoding="utf-8")
        used = {name: path for name, path in runtimes.items() if name in plan.treatments}
        for name, code in carried_files(family, used, classes_in(checkpoint, family).values()).items():
            (folder / name).write_bytes(code)
    config = plain.config if plain else converted_config(checkpoint, family, plan, stock)
    (folder / "config.json").write_text(as_json(config), encoding="utf-8")
    total = sum(plan.bytes for plan in plan_shards(checkpoint, edits))
    with progress_bytes(total, "Writing weights") as bar:
        return write_shards(checkpoint, edits, folder, bar.update)
