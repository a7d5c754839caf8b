"""What a model is converted for: the code in its folder, or an engine that knows classes of its own alone.

For such an engine a plan may hold what stock classes save memory with, and becomes keys of config.json. Which model
types have such a class, and which keys tell it, stands in `sa_convert/families/models`, under "stock_windows" and, for
layers without attention or with fewer KV groups (`engine_blocks.py`), "stock_blocks".
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.domain.model import Model
from sa_convert.domain.plan import Plan
from sa_convert.domain.stock import StockForm
from sa_convert.errors import PlanError, RecipeError, UnsupportedModelError
from sa_convert.families.family import Family, StockWindows
from sa_convert.families.table import FAMILIES
from sa_convert.plan.engine_blocks import FIRST, IN_BLOCKS, blocks_form, blocks_of
from sa_convert.read.family_of import architecture_of
from sa_convert.treatments.base import Treatment
from sa_convert.treatments.drop.treatment import DropTreatment
from sa_convert.treatments.merge.treatment import MergeTreatment
from sa_convert.treatments.window.rules import WindowLimits
from sa_convert.treatments.window.treatment import WindowTreatment

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Recipe

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Engine:
    """One that runs classes of its own alone. title: as people write it. treatments: what saves memory there."""

    name: str
    title: str
    treatments: tuple[str, ...]


ENGINES = {"vllm": Engine("vllm", "vLLM", treatments=("window", *IN_BLOCKS))}
"""By the name that recipes use. What is written for "transformers" carries code, and may use every treatment."""


def engine_of(recipe: "Recipe") -> Engine | None:
    """None: the code in the folder runs."""
    return ENGINES.get(recipe.engine)


def check_engine(recipe: "Recipe", model: Model) -> None:
    """Raises RecipeError for what the recipe asks that its engine has not, UnsupportedModelError for a model that no
    class is there for; both before any weight is read."""
    engine = engine_of(recipe)
    if engine is None:
        return
    allowed = " or ".join(engine.treatments)
    for at, name in enumerate(recipe.treatments or ()):
        if name not in engine.treatments:
            raise RecipeError(
                f"{recipe.origin.at('treatments', at)}: {engine.title} has nothing of its own that saves memory by "
                f"'{name}'; for: {engine.name} takes {allowed}."
            )
    if "window" in (recipe.treatments or ()) and set(recipe.treatments or ()) & set(IN_BLOCKS):
        raise RecipeError(
            f"{recipe.origin.at('treatments')}: {engine.title} has no class with windows in some layers and no "
            f"attention, or fewer KV groups, in others; for: {engine.name} takes window, or "
            f"{' and '.join(IN_BLOCKS)}."
        )
    if recipe.sharing is not None:
        raise RecipeError(
            f"{recipe.origin.at('sharing')}: {engine.title} has nothing of its own that shares attention; for: "
            f"{engine.name} takes {allowed}."
        )
    if _in_blocks(recipe):
        blocks_of(model, engine)
    else:
        _windows_of(model, engine)


def _in_blocks(recipe: "Recipe") -> set[str]:
    """What a recipe is about of layers without attention, or with fewer KV groups, rather than windows."""
    told: set[str] = set(recipe.treatments or ())
    for planned in (recipe.plan or {}).values():
        told |= {planned} if isinstance(planned, str) else {name for name in planned if isinstance(name, str)}
        groups = () if isinstance(planned, str) else (each for at, each in planned.items() if isinstance(at, int))
        told |= {name for each in groups for name in each}
    return told & set(IN_BLOCKS)


def searched_model(model: Model, recipe: "Recipe") -> Model:
    """The model as a search has to see it: for an engine, layers are treated as wholes."""
    if engine_of(recipe) is None:
        return model
    return replace(model, geometry=replace(model.geometry, granularity="layer"))


def searched_for(model: Model, recipe: "Recipe") -> tuple[Treatment, ...] | None:
    """What a search for an engine may use; None: whatever the recipe says."""
    if engine_of(recipe) is None:
        return None
    if blocks := _in_blocks(recipe):
        known: tuple[Treatment, ...] = (MergeTreatment(), DropTreatment(spared=(FIRST,)))
        return tuple(treatment for treatment in known if treatment.name in blocks)
    size = own_window(model.geometry)
    return (WindowTreatment(WindowLimits(sinks=0, sizes=(size,) if size else None, whole_layers=True)),)


def stock_form(model: Model, plan: Plan, recipe: "Recipe") -> StockForm | None:
    """How a plan is written for the recipe's engine; None: only with the code that carries it out.

    Raises PlanError for a plan that a stock class cannot be told, and as `check_engine`.
    """
    engine = engine_of(recipe)
    if engine is None:
        return None
    check_engine(recipe, model)
    if set(plan.treatments) & set(IN_BLOCKS):
        return blocks_form(model, plan, engine)
    check_windows(plan, model.geometry, engine)
    windows = _windows_of(model, engine)
    written = FAMILIES[windows.written_as] if windows.written_as else model.family
    return StockForm(
        engine=engine.name,
        config=stock_config(model, plan, written),
        layers=plan.to_json(),
        options=windows.options.get(engine.name, ""),
    )


def check_windows(plan: Plan, geometry: ModelGeometry, engine: Engine) -> None:
    """Raise PlanError unless the plan gives some layers, each as a whole, windows of one length without sinks."""
    size, found = own_window(geometry), set[int]()
    for index, planned in plan.layers.items():
        where, layer = f"Layer {plan.label(index)}", geometry.layers[index]
        told = [] if isinstance(planned, str) else [dict(planned.get(group, {})) for group in range(layer.groups)]
        if isinstance(planned, str) or any(set(one) - {"window"} for one in told):
            raise PlanError(
                f"{where}: {engine.title} knows windows of whole layers, or layers without attention or with fewer KV "
                "groups, so nothing else can be done for it."
            )
        windows = [dict(one["window"]) for one in told if one]
        if len(windows) < layer.groups or any(one != windows[0] for one in windows):
            raise PlanError(f"{where}: {engine.title} has one window for all KV groups of a layer: give them the same.")
        if windows[0]["sinks"]:
            raise PlanError(f"{where}: {engine.title} keeps no first tokens beside a window: write sinks: 0.")
        if layer.window is not None or layer.attention != FULL:
            raise PlanError(f"{where} has {layer.kind} attention already, so it cannot have another window.")
        found.add(windows[0]["tokens"])
    if size is not None and found - {size}:
        raise PlanError(
            f"config.json has one length for all windows, and layers of this model have {size} tokens already, so no "
            f"layer can have {min(found - {size})}."
        )
    if len(found) > 1:
        raise PlanError(
            f"config.json has one length for all windows, so they cannot be {min(found)} and {max(found)} tokens."
        )


def own_window(geometry: ModelGeometry) -> int | None:
    """The length of the windows that layers have in the base, or None if there are none."""
    return next((layer.window for layer in geometry.layers if layer.window is not None), None)


def stock_config(model: Model, plan: Plan, written: Family) -> dict[str, Any]:
    """config.json of the model as a class of type `written`, with the windows of a plan."""
    base, geometry = model.checkpoint.config, model.geometry
    windows = model.family.stock_windows
    assert windows is not None
    sizes = [next(iter(groups.values()))["tokens"] for groups in plan.groups_of("window").values()]
    config = {key: value for key, value in base.items() if key not in ("auto_map", *windows.drops)}
    if written.model_type != model.family.model_type:
        layer = geometry.layers[0]
        config = {**windows.fills, model.family.groups: layer.groups, "head_dim": layer.head_dim, **config}
        # transformers warns of Mistral's tokenizers that it has saved before release 5; this one is none of these.
        config["transformers_version"] = _version(base)
    return config | {
        "model_type": written.model_type,
        "architectures": [_class_of(model, written)],
        **windows.sets,
        "layer_types": [
            SLIDING if index in plan.layers else layer.attention for index, layer in enumerate(geometry.layers)
        ],
        "sliding_window": sizes[0],
    }


def without_windows(layer: LayerGeometry) -> LayerGeometry:
    """A layer that was given a window, as it is in the base."""
    return replace(layer, attention=FULL, window=None)


def _version(config: Any) -> str:
    told = str(config.get("transformers_version") or "")
    return told if told.partition(".")[0].isdecimal() and int(told.partition(".")[0]) >= 5 else "5.0.0"


def _class_of(model: Model, written: Family) -> str:
    found = architecture_of(model.checkpoint.config, model.family)
    start = model.family.config_class.removesuffix("Config")
    return written.config_class.removesuffix("Config") + found.removeprefix(start)


def _windows_of(model: Model, engine: Engine) -> StockWindows:
    """Raises UnsupportedModelError, with the reason."""
    family, config = model.family, model.checkpoint.config
    windows, start = family.stock_windows, f"for: {engine.name}: models of type '{family.model_type}'"
    if windows is None or windows.refused:
        known = ", ".join(sorted(name for name in FAMILIES if _usable(FAMILIES[name].stock_windows)))
        why = windows.refused if windows else "no class that transformers and the engine know is told which layers"
        raise UnsupportedModelError(
            f"{start} cannot be written without code: {why}{'' if windows else ' have a window'}. Types that can: "
            f"{known}. Without 'for', the folder carries the code."
        )
    found = architecture_of(config, family)
    if found != family.default_class:
        raise UnsupportedModelError(
            f"{start} are written for it as {family.default_class} only, and this is a {found}."
        )
    for key, value in windows.needs.items():
        if config.get(key, value) != value:
            raise UnsupportedModelError(
                f"{start} can be written without code only if '{key}' in config.json is {value!r}, and it is "
                f"{config[key]!r} here. {windows.why}"
            )
    if all(layer.window is not None for layer in model.geometry.layers):
        raise UnsupportedModelError(
            f"{start}: every layer of this one has a window of {own_window(model.geometry)} tokens already, and "
            "config.json has one length for all."
        )
    return windows


def _usable(windows: StockWindows | None) -> bool:
    return windows is not None and not windows.refused
