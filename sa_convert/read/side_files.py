"""The files of a model folder that belong to the model beside config.json and the weights."""

import os
from fnmatch import fnmatchcase
from pathlib import Path

from sa_convert.errors import CheckpointError
from sa_convert.read.inside import check_inside

WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data*", "*.gguf",
    "*.ggml", "*.ot", "*.npz", "*.tflite", "*.mlmodel", "*.pkl", "*.pickle", "*.index.json", "openvino_*",
)  # fmt: skip
"""Weights of any format, and their indices: we write our own. `params.json` describes `consolidated.*` weights."""

CUSTOM_GENERATE = "custom_generate"
"""A folder with code for generate(), which transformers runs wherever the model's code is trusted."""

_TRAINING = ("trainer_state.json", "optimizer*", "scheduler*", "rng_state*", "events.out.tfevents*")
_WRITTEN_ANEW = ("config.json", "params.json", "README.md", "recipe.yaml", "report.json")
_FOLDERS = (
    "original", "onnx", "openvino", "figures", "runs", "checkpoint-*", "global_step*", "__pycache__", "*.mlpackage",
)  # fmt: skip
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
        for name in files:
            path = (here / name).relative_to(folder)
            if is_side_file(path):
                check_inside(here / name, folder, "this part of the model")
                found.append(path)
    return tuple(sorted(found))


def is_side_file(path: Path) -> bool:
    """Whether a file (relative to the model's folder) belongs to the model, by its name."""
    if any(_matches(name, (".*", *_FOLDERS)) for name in path.parts[:-1]) or path.parts[0] == CUSTOM_GENERATE:
        return False
    ignored = (".*", _CODE, *WEIGHTS, *_TRAINING, *(_WRITTEN_ANEW if len(path.parts) == 1 else ()))
    return not _matches(path.name, ignored)


def code_files(folder: Path) -> tuple[Path, ...]:
    """Python files in the (resolved) folder, relative to it, sorted; hidden ones are left out.

    Raises CheckpointError for a link that leads out of the folder.
    """
    found = sorted(path.relative_to(folder) for path in folder.rglob(_CODE))
    code = tuple(path for path in found if is_code(path))
    for path in code:
        check_inside(folder / path, folder, "this code")
    return code


def is_code(path: Path) -> bool:
    """Whether a file (relative to the model's folder) is Python code that the model may bring along."""
    return path.suffix == ".py" and not any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _fail(error: OSError) -> None:
    raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}.") from error
