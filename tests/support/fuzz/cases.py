"""One damaged input and the command that reads it, made from a seed: the same name gives the same case anywhere."""

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.fuzz import subjects as base
from support.fuzz.gguf_file import mutate_gguf
from support.fuzz.mutate_bytes import mutate_bytes
from support.fuzz.mutate_json import Pairs, mutate_json
from support.fuzz.mutate_yaml import mutate_recipe
from support.fuzz.subjects import Subjects, copy_model, replace_file

INDEX = "model.safetensors.index.json"
OUTPUT = "out"


@dataclass(frozen=True)
class Case:
    """arguments: of sa-convert, run in any folder. output: the folder that it would make, or None."""

    name: str
    arguments: tuple[str, ...]
    output: Path | None


Maker = Callable[[random.Random, Path, Subjects], "tuple[Path, Path]"]
"""Writes the damaged input into a folder; returns the model and the recipe."""


def make_case(name: str, seed: int, folder: Path, subjects: Subjects) -> Case:
    """name: a kind and a number, such as "header:17". folder: an empty one, for the input and the output."""
    kind = name.partition(":")[0]
    chance = random.Random(f"{seed}:{name}")
    model, recipe = KINDS[kind](chance, folder, subjects)
    output = folder / OUTPUT
    convert = ("convert", str(model), "--recipe", str(recipe))
    if kind == "recipe" and (chance.random() < 0.3 or _runs_a_model(recipe.read_bytes())):
        return Case(name, ("recipes", str(recipe)), None)
    if kind == "earlier output":
        return Case(name, (*convert, "-o", str(output), "--no-validate", "--overwrite"), output)
    way = chance.random()
    if way < 0.65:
        return Case(name, (*convert, "-o", str(output), "--no-validate"), output)
    if way < 0.75:
        return Case(name, (*convert, "-o", str(output), "--no-validate", "--json"), output)
    if way < 0.85:
        return Case(name, (*convert, "-o", str(output), "--dry-run", "--json"), None)
    return Case(name, ("inspect", str(model), *(["--json"] if way < 0.95 else [])), None)


def _runs_a_model(recipe: bytes) -> bool:
    """Whether it may still be a valid search or refit: minutes of work, and not what is looked for."""
    return b"search" in recipe or b"ridge" in recipe


def _header(chance: random.Random, folder: Path, subjects: Subjects) -> tuple[Path, Path]:
    name = chance.choice((base.SINGLE, base.SHARDED))
    model = copy_model(subjects.folder(name), folder / "model")
    file = chance.choice(sorted(model.glob("*.safetensors")))
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if chance.random() < 0.4:
        new = mutate_bytes(data, chance, focus=8 + length)
    else:
        words = ("F32", "F4", "F6_E2M3", "BOOL", "I64", "F99", "f32", [0, 0], [2**63, 2], [2**32, 2**32], [], [0],
                 [-1, -1], [3072])  # fmt: skip
        text = mutate_json(data[8 : 8 + length].decode().rstrip(), chance, words).encode("utf-8", "surrogatepass")
        claimed = chance.choice((len(text),) * 12 + (0, 1, len(text) + 1, len(text) - 1, 99_999_999, 2**63, 2**64 - 1))
        new = (claimed % 2**64).to_bytes(8, "little") + text + data[8 + length :]
    replace_file(file, new)
    return model, subjects.recipe


def _index(chance: random.Random, folder: Path, subjects: Subjects) -> tuple[Path, Path]:
    model = copy_model(subjects.folder(base.SHARDED), folder / "model")
    shards = sorted(file.name for file in model.glob("*.safetensors"))
    words = (*shards, "../model/config.json", "/etc/passwd", "config.json", "absent.safetensors", ".", "..", "a\0b",
    "x" * 300,
             "x" * 5000, "./" + shards[0], "sub/../" + shards[0], INDEX, "C:\\x", "a\\b", "model")  # fmt: skip
    _damage(model / INDEX, chance, words)
    return model, subjects.recipe


def _config(chance: random.Random, folder: Path, subjects: Subjects) -> tuple[Path, Path]:
    name = chance.choice((base.SINGLE, base.SHARDED, base.CONVERTED, *subjects.families))
    model = copy_model(subjects.folder(name), folder / "model")
    words = ("llama", "bert", "t5", "gpt2", "qwen3_next", "shared_attention_llama", "LlamaForCausalLM", "LlamaModel",
             "full_attention", "sliding_attention", "linear_attention", ["full_attention"], [0, 1], {},
             [[]])  # fmt: skip
    _damage(model / "config.json", chance, tuple(_as_kept(words)))
    return model, subjects.recipe


def _as_kept(words: tuple) -> list:
    """Plain values as `mutate_json` keeps them: an object is made of pairs."""
    return [Pairs([]) if word == {} else word for word in words]


def _side_file(chance: random.Random, folder: Path, subjects: Subjects) -> tuple[Path, Path]:
    """Tokenizer and generation files, the model card; or no ordinary file where one should be."""
    model = copy_model(subjects.folder(chance.choice((base.SINGLE, base.SHARDED))), folder / "model")
    if chance.random() < 0.3:
        _no_file(chance.choice(sorted(model.iterdir())), chance)
    elif chance.random() < 0.3:
        replace_file(model / "README.md", _card(chance))
    else:
        read = "tokenizer_config.json"
        name = chance.choice((read, read, "generation_config.json", "tokenizer.json"))
        words = ("LlamaTokenizerFast", "PreTrainedTokenizerFast", "own.Own", "org/repo--own.Own", "../x.Own")
        _damage(model / name, chance, words)
    return model, subjects.recipe


def _card(chance: random.Random) -> bytes:
    if chance.random() < 0.5:
        return mutate_bytes(base.CARD.encode(), chance)
    inner = mutate_recipe("\n".join(base.CARD.splitlines()[1:-2]), chance)
    return b"---\n" + inner + b"\n---\n# A card\n"


def _no_file(path: Path, chance: random.Random) -> None:
    path.unlink()
    way = chance.randrange(7)
    if way == 0:
        path.mkdir()
    elif way == 1:
        path.symlink_to(path.name)
    elif way == 2:
        path.symlink_to("/etc/hostname")
    elif way == 3:
        path.symlink_to("absent")
    elif way == 4:
        os.mkfifo(path)
    elif way == 5:
        path.symlink_to("/dev/zero")
    else:
        path.with_name(path.name + ".part").touch()


def _recipe(chance: random.Random, folder: Path, subjects: Subjects) -> tuple[Path, Path]:
    import yaml

    text = chance.choice((base.SPANS, base.MAP, base.MAP, base.SEARCH))
    as_json = json.dumps(yaml.safe_load(text))
    recipe = folder / chance.choice(("recipe.yaml", "recipe.yaml", "recipe.json"))
    recipe.write_bytes(mutate_recipe(text, chance, as_json))
    return subjects.folder(base.SINGLE), recipe


def _gguf(chance: random.Random, folder: Path, subjects: Subjects) -> tuple[Path, Path]:
    file = folder / chance.choice(("model.gguf", "model.gguf", "model.gguf", "model-00001-of-00002.gguf", "MODEL.GGUF"))
    file.write_bytes(mutate_gguf(chance))
    return file, subjects.recipe


def _earlier(chance: random.Random, folder: Path, subjects: Subjects) -> tuple[Path, Path]:
    """What stands at the destination, and --overwrite may or may not replace."""
    output = folder / OUTPUT
    if chance.random() < 0.6:
        copy_model(subjects.folder(base.CONVERTED), output)
        file = output / chance.choice(("config.json", "config.json", "report.json"))
    else:
        output.mkdir()
        (output / "recipe.yaml").write_text(base.SPANS)
        file = output / "analysis.json"
        file.write_text(json.dumps({"versions": {"sa_convert": "1.0"}, "model": "m"}))
    if chance.random() < 0.2:
        _no_file(file, chance)
    else:
        _damage(file, chance, ("sa_convert", "shared_attention", ["sa_convert"]))
    return subjects.folder(base.SINGLE), subjects.recipe


def _damage(file: Path, chance: random.Random, words: tuple) -> None:
    text = file.read_text()
    if chance.random() < 0.3:
        replace_file(file, mutate_bytes(text.encode(), chance))
    else:
        replace_file(file, mutate_json(text, chance, words).encode("utf-8", "surrogatepass"))


KINDS: dict[str, Maker] = {
    "header": _header,
    "index": _index,
    "config": _config,
    "side file": _side_file,
    "recipe": _recipe,
    "gguf": _gguf,
    "earlier output": _earlier,
}
SHARES = {"header": 27, "index": 12, "config": 25, "side file": 6, "recipe": 15, "gguf": 12, "earlier output": 3}
"""Of each kind, in a hundred cases."""


def case_names(count: int, kinds: tuple[str, ...] = tuple(KINDS)) -> list[str]:
    """The kinds in turn, so that a run which is cut short has seen all of them."""
    counts = dict.fromkeys(kinds, 0)
    total = sum(SHARES[kind] for kind in kinds)
    names = []
    for number in range(count):
        kind = max(kinds, key=lambda kind: (number + 1) * SHARES[kind] / total - counts[kind])
        names.append(f"{kind}:{counts[kind]}")
        counts[kind] += 1
    return names
