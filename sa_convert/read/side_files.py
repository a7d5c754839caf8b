"""The files of a model folder that belong to the model beside config.json and the weights."""

import os
from fnmatch import fnmatchcase
from pathlib import Path

from sa_convert.errors import CheckpointError
from sa_convert.read.inside import check_inside

WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data*", "*.gguf",
    "*.ggml", "*.ot", "*.npz", "*.tflite", "*.mlmodel", "*.pkl", "*.pickle", "*.index.json",
)  # fmt: skip
"""Weights of any format, and their indices: we write our own. `params.json` describes `consolidated.*` weights."""

_TRAINING = ("trainer_state.json", "optimizer*", "scheduler*", "rng_state*", "events.out.tfevents*")
_WRITTEN_ANEW = ("config.json", "params.json", "README.md", "recipe.yaml", "report.json")
_FOLDERS = ("original", "figures", "runs", "checkpoint-*", "global_step*", "__pycache__", "*.mlpackage")
_CODE = "*.py"


def side_files(folder: Path) -> tuple[Path, ...]:
    """Paths relative to the (resolved) folder, sorted: tokenizer, chat template, generation config, license, ...

    Left out: weights, code (the converted model brings its own), hidden files and folders, leftovers of training, and
    what every conversion writes anew (config.json, README.md, recipe.yaml, report.json, figures/).
    Raises CheckpointError for a link that leads out of the folder.
    """
    found = []
    for root, folders, files in os.walk(folder, onerror=_fail):
        here = Path(root)
        folders[:] = sorted(name for name in folders if not _matches(name, (".*", *_FOLDERS)))
        for name in folders:
            if (here / name).is_symlink():
                check_inside(here / name, folder, "this part of the model")
        ignored = (".*", _CODE, *WEIGHTS, *_TRAINING, *(_WRITTEN_ANEW if here == folder else ()))
        for name in files:
            if not _matches(name, ignored):
                check_inside(here / name, folder, "this part of the model")
                found.append((here / name).relative_to(folder))
    return tuple(sorted(found))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _fail(error: OSError) -> None:
    raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}.") from error
