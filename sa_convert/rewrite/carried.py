"""The code that a converted model carries: which files a family and a plan need, and what stands in them.

Files are copied whole from the package. Two of them end with the few lines that name their classes.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import sa_convert.runtime
from sa_convert.families.family import CLASS_PREFIX, PREFIX, Family

HOME = Path(sa_convert.runtime.__file__).parent

CONFIGURATION, MODELING, SPECIAL = (
    f"{name}.py" for name in ("configuration_shared_attention", "modeling_shared_attention", "shared_attention_special")
)

WITH = {
    "outgrown": ("shared_attention_parts", "PartedAttention"),
    "output": ("shared_attention_whole", "WholeAttention"),
}
"""Carried only if a treatment in the plan needs it, which its class shows by a method of this name: a file, and the
class in it that comes before our attention class."""

TOKENIZERS = HOME / "tokenizer" / "tokenization_mistral.py"
"""Carried only by a model whose tokenizer_config.json names it."""


def class_name(treatment: str) -> str:
    """The class in a treatment's runtime file: "LowRank" of low_rank."""
    return "".join(word.capitalize() for word in treatment.split("_"))


def is_carried(name: str) -> bool:
    """Whether a file of this name may be one that a converted model carries."""
    return name in (CONFIGURATION, MODELING, TOKENIZERS.name) or name.startswith("shared_attention_")


def carried_files(family: Family, treatments: Mapping[str, Path], classes: Iterable[str]) -> dict[str, bytes]:
    """Name and content of every code file that a converted model carries.

    treatments: the runtime file of each treatment in the plan, the outermost first, which is the order in which they
    run. classes: the base's model classes that auto_map names.
    """
    files = {f"shared_attention_{name}.py": path.read_text(encoding="utf-8") for name, path in treatments.items()}
    has = {name for text in files.values() for name in _methods(text)}
    special = family.modules.special_class
    before = [(SPECIAL.removesuffix(".py"), special)] if special else []
    before += [needed for method, needed in WITH.items() if method in has]
    files |= {f"{name}.py": (HOME / f"{name}.py").read_text(encoding="utf-8") for name, _ in before}
    ending = _modeling(family, before, list(treatments), sorted(set(classes)))
    files[MODELING] = (HOME / MODELING).read_text(encoding="utf-8") + ending
    # transformers keeps the model class of a configuration class, which it knows by the bytes of its file: of two
    # models with other code and one name, the second would run the code of the first.
    digest = hashlib.sha256("".join(files[name] for name in sorted(files)).encode()).hexdigest()[:16]
    configuration = (HOME / CONFIGURATION).read_text(encoding="utf-8") + _configuration(family, digest)
    return {name: text.encode() for name, text in {CONFIGURATION: configuration, **files}.items()}


def auto_map(family: Family, classes: Mapping[str, str]) -> dict[str, str]:
    """What config.json names: the classes of these files. classes: the base's, by auto class."""
    return {
        "AutoConfig": f"{CONFIGURATION.removesuffix('.py')}.{CLASS_PREFIX}{family.config_class}",
        **{name: f"{MODELING.removesuffix('.py')}.{CLASS_PREFIX}{found}" for name, found in classes.items()},
    }


def _configuration(family: Family, digest: str) -> str:
    needs = "\n    needs_5 = True" if family.transformers_5 else ""
    return f'''

class {CLASS_PREFIX}{family.config_class}(TreatedConfig, transformers.{family.config_class}):
    model_type = "{PREFIX}{family.model_type}"{needs}
    carried_code = "{digest}"
'''


def _methods(code: str) -> Iterator[str]:
    """Names of all methods in the classes of a file."""
    for node in ast.parse(code).body:
        if isinstance(node, ast.ClassDef):
            yield from (item.name for item in node.body if isinstance(item, ast.FunctionDef))


def _modeling(family: Family, before: list[tuple[str, str]], treatments: list[str], classes: list[str]) -> str:
    """before: files, and classes in them that come before our attention class."""
    config = f"{CLASS_PREFIX}{family.config_class}"
    named = {name: class_name(name) for name in treatments}
    imported = [("configuration_shared_attention", config)]
    imported += [(f"shared_attention_{name}", title) for name, title in named.items()] + before
    imports = [f"from .{file} import {title}  # noqa: E402" for file, title in imported]
    bases = "".join(f"{title}, " for _, title in before)
    attention = f"\n\nclass _Attention({bases}TreatedAttention):\n    pass\n" if before else ""
    listed = ", ".join(f'"{name}": {title}' for name, title in named.items())
    uses = "\n    attention_class = _Attention" if before else ""
    models = "".join(f'\n\nclass {CLASS_PREFIX}{name}(_Treated, base_class("{name}")):\n    pass\n' for name in classes)
    return (
        "\n\n" + "\n".join(imports) + f"\n{attention}\n\nclass _Treated(TreatedModel):\n    config_class = {config}\n"
        f"    treatments = {{{listed}}}{uses}\n{models}"
    )
