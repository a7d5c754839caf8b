"""The processor of a converted multimodal model: AutoProcessor is to choose the classes that it chose for the base.

If no file names them it chooses by the model type, and does not know ours: it would return a bare tokenizer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.families.family import Family
from sa_convert.read.folder import read_json

PROCESSOR, IMAGES, VIDEOS = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"

_KEYS = {
    IMAGES: ("image_processor_type", "feature_extractor_type"),
    VIDEOS: ("video_processor_type",),
}
"""The keys under which a file may name the class, first the one that is written."""


def processor_configs(checkpoint: Checkpoint, family: Family) -> dict[str, dict[str, Any]]:
    """New content of the files that do not name the class that transformers took for the base.

    The processor's own class may stand in any of several files; if it is in none, the first that the base has gets it.
    Raises CheckpointError for a file that is no JSON object.
    """
    classes = {PROCESSOR: family.processor.main, IMAGES: family.processor.images, VIDEOS: family.processor.videos}
    if not any(classes.values()):
        return {}
    found = {
        name: read_json(checkpoint.folder / name)
        for name in (PROCESSOR, IMAGES, VIDEOS, "tokenizer_config.json")
        if Path(name) in checkpoint.side_files
    }
    named = any("processor_class" in content or "AutoProcessor" in _code(content) for content in found.values())
    changed: dict[str, dict[str, Any]] = {}
    if not named and "processor_class" not in checkpoint.config:
        home = next((name for name in (PROCESSOR, IMAGES) if name in found), PROCESSOR)
        changed[home] = {**found.get(home, {}), "processor_class": classes[PROCESSOR]}
    for name in (IMAGES, VIDEOS):
        content = found.get(name)
        if content is None or classes[name] is None or _code(content):
            continue
        if not any(key in content or key in checkpoint.config for key in _KEYS[name]):
            changed[name] = {**changed.get(name, content), _KEYS[name][0]: classes[name]}
    return changed


def _code(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `auto_map` names."""
    named = content.get("auto_map")
    return named if isinstance(named, Mapping) else {}
