"""The code that a converted model carries: which files a family and a plan need, and what stands in them.

Files are copied whole from the package. Two of them end with the few lines that name their classes.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import sa_convert.runtime
from sa_convert.families.family import CLASS_PREFIX, PREFIX, Family

HOME = Path(sa_convert.runtime.__file__).parent

CONFIGURATION, MODELING, SPECIAL = (
    f"{name}.py" for name in ("configuration_shared_attention", "modeling_shared_attention", "shared_attention_special")
)

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
    special = family.modules.special_class
    files = {
        MODELING: (HOME / MODELING).read_text(encoding="utf-8")
        + _modeling(family, special, list(treatments), sorted(set(classes))),
    }
    files |= {f"shared_attention_{name}.py": path.read_text(encoding="utf-8") for name, path in treatments.items()}
    if special:
        files[SPECIAL] = (HOME / SPECIAL).read_text(encoding="utf-8")
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


def _modeling(family: Family, special: str | None, treatments: list[str], classes: list[str]) -> str:
    config = f"{CLASS_PREFIX}{family.config_class}"
    named = {name: class_name(name) for name in treatments}
    imports = [f"from .configuration_shared_attention import {config}  # noqa: E402"]
    imports += [f"from .shared_attention_{name} import {title}  # noqa: E402" for name, title in named.items()]
    imports += [f"from .shared_attention_special import {special}  # noqa: E402"] if special else []
    attention = f"\n\nclass _Attention({special}, TreatedAttention):\n    pass\n" if special else ""
    listed = ", ".join(f'"{name}": {title}' for name, title in named.items())
    uses = "\n    attention_class = _Attention" if special else ""
    models = "".join(f'\n\nclass {CLASS_PREFIX}{name}(_Treated, base_class("{name}")):\n    pass\n' for name in classes)
    return (
        "\n\n" + "\n".join(imports) + f"\n{attention}\n\nclass _Treated(TreatedModel):\n    config_class = {config}\n"
        f"    treatments = {{{listed}}}{uses}\n{models}"
    )
