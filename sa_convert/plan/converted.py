"""A converted model: what its base was like, and its plan."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.model import Model
from sa_convert.domain.plan import Plan
from sa_convert.domain.stacks import layer_of, parse_label
from sa_convert.errors import CheckpointError, UnsupportedModelError
from sa_convert.families.family import PREFIX, Family
from sa_convert.families.table import FAMILIES
from sa_convert.plan.conversion import check_plan
from sa_convert.plan.engines import without_windows
from sa_convert.read.family_of import family_of
from sa_convert.read.geometry_of import geometry_of, groups_in
from sa_convert.read.names import attention_config
from sa_convert.read.stock_folder import stock_told
from sa_convert.treatments.registry import named, treatments


def converted_parts(checkpoint: Checkpoint) -> tuple[Model, Plan]:
    """A converted model, with the geometry of its base, and its plan; the keys that it lost are not in its files.

    Raises UnsupportedModelError for an unknown base type, CheckpointError or PlanError for wrong files.
    """
    stock = stock_told(checkpoint.folder)
    if stock is not None:
        return _stock_parts(checkpoint, stock.get("layers"))
    config = checkpoint.config
    base = str(config["model_type"]).removeprefix(PREFIX)
    family = FAMILIES.get(base)
    if family is None:
        raise UnsupportedModelError(
            f"The model has type '{config['model_type']}', whose base '{base}' this version does not know."
        )
    geometry = geometry_of(checkpoint, family, _reshaped(config["shared_attention"].get("layers")))
    model = Model(checkpoint=checkpoint, family=family, geometry=geometry)
    layers = upgraded(config, family, geometry)["shared_attention"].get("layers")
    try:
        plan = Plan.from_json(layers, geometry.stacks)
        for name in plan.treatments:
            treatment = named(name)
            if treatment is None:
                raise UnsupportedModelError(
                    f"config.json: 'shared_attention' names the treatment '{name}', which this version does not know: "
                    "run pip install -U sa-convert."
                )
            for groups in plan.groups_of(name).values():
                for arguments in groups.values():
                    treatment.parse(arguments)
    except (AttributeError, TypeError, ValueError, LookupError):
        raise CheckpointError(
            "config.json: 'shared_attention' does not list treatments, such as sources for heads, for KV groups."
        ) from None
    check_plan(plan, model)
    return model, plan


def _reshaped(layers: Any) -> tuple[str, ...]:
    """The labels of layers whose tensors may not have the shapes that they have in the base."""
    if not isinstance(layers, Mapping):
        return ()
    kept = {treatment.name for treatment in treatments() if treatment.keeps_shapes}
    return tuple(label for label, groups in layers.items() if not _names_in(groups) or _names_in(groups) - kept)


def _names_in(groups: Any) -> set[str]:
    """The treatments of a layer; none if it is written as in version 1."""
    if isinstance(groups, str):
        return {groups}
    named = groups.values() if isinstance(groups, Mapping) else ()
    return {name for treated in named if isinstance(treated, Mapping) for name in treated}


def _stock_parts(checkpoint: Checkpoint, layers: Any) -> tuple[Model, Plan]:
    """Of a model that was written without code. layers: its plan, as report.json has it."""
    try:
        plan = Plan.from_json(layers)
        windows = [window for groups in plan.groups_of("window").values() for window in groups.values()]
        told = {(window["sinks"], window["tokens"]) for window in windows}
    except (AttributeError, TypeError, ValueError, LookupError):
        raise CheckpointError("report.json: 'for' does not list treatments for KV groups under 'layers'.") from None
    model = stock_parts(checkpoint, plan)
    check_plan(plan, model)
    if told != {(0, checkpoint.config.get("sliding_window"))}:
        raise CheckpointError("config.json has another 'sliding_window' than report.json tells of.")
    return model, plan


def stock_parts(checkpoint: Checkpoint, plan: Plan) -> Model:
    """A model that was written without code, with the geometry of its base: layers that the plan treats see all.

    Raises CheckpointError if config.json does not give a window to each of them.
    """
    family = family_of(checkpoint.config, checkpoint.tensors)
    geometry = geometry_of(checkpoint, family)
    wrong = next((at for at in plan.layers if at >= len(geometry.layers) or geometry.layers[at].window is None), None)
    if wrong is not None:
        raise CheckpointError(f"config.json: 'layer_types' gives layer {wrong} no window, which the plan has one for.")
    layers = tuple(
        without_windows(layer) if index in plan.layers else layer for index, layer in enumerate(geometry.layers)
    )
    return Model(checkpoint=checkpoint, family=family, geometry=replace(geometry, layers=layers))


VERSION = 2
"""Of what stands under `shared_attention` in config.json."""


def upgraded(config: Mapping[str, Any], family: Family, geometry: ModelGeometry | None = None) -> dict[str, Any]:
    """config.json of a converted model, with `shared_attention` as version 2 has it; no other key changes.

    Version 1, which has no "version", lists the sources of whole layers: {"layers": {"27": [[26, 4], null, ...]}}.
    Version 2 lists them by KV group and treatment: {"layers": {"27": {"0": {"share": [[26, 4], null, ...]}, ...}}}.
    geometry: if it is known, KV groups are as it has them rather than as config.json says.
    Raises CheckpointError if it is neither, UnsupportedModelError if it is of a later version.
    """
    shared = config.get("shared_attention")
    version = shared.get("version", 1) if isinstance(shared, Mapping) else None
    if version == VERSION:
        return dict(config)
    if isinstance(version, int) and version > VERSION:
        raise UnsupportedModelError(
            f"config.json: 'shared_attention' has version {version}, which a later sa-convert has written: run "
            "pip install -U sa-convert."
        )
    try:
        rows = shared["layers"]  # type: ignore[index]
        layers = {str(label): _by_group(str(label), row, config, family, geometry) for label, row in rows.items()}
    except (AttributeError, LookupError, TypeError, ValueError, ZeroDivisionError):
        raise CheckpointError(
            "config.json: 'shared_attention' does not list sources for the heads of layers."
        ) from None
    kept = {key: value for key, value in shared.items() if key != "layers"}  # type: ignore[union-attr]
    filled = {label: groups for label, groups in layers.items() if groups}
    return dict(config) | {
        "shared_attention": {"version": VERSION, "modules": family.modules.to_json(), "layers": filled, **kept}
    }


def _by_group(
    label: str, row: list[Any], config: Mapping[str, Any], family: Family, geometry: ModelGeometry | None
) -> dict[str, Any]:
    """The sources of a layer's heads by KV group; groups all of whose heads own their attention are left out."""
    if geometry is None:
        groups = groups_in(attention_config(config, family), family, len(row))
    else:
        groups = geometry.layers[layer_of(geometry.stacks, *parse_label(label))].groups
    size, rest = divmod(len(row), groups)
    if rest or not size:
        raise ValueError(f"{len(row)} heads in {groups} KV groups")
    parts = {str(group): list(row[group * size : (group + 1) * size]) for group in range(groups)}
    return {group: {"share": heads} for group, heads in parts.items() if any(heads)}
