"""Folders as earlier versions of sa-convert wrote them: config.json of version 1, and the code of that time.

version_1.tar.xz holds that code, by commit, as it was written into folders.
"""

import json
import tarfile
from pathlib import Path

from sa_convert.families.table import FAMILIES
from support.tiny_models import geometry_of_folder

ARCHIVE = Path(__file__).with_name("version_1.tar.xz")


def rows_of(layers: dict, group_size: int, groups: int) -> dict:
    """{"27": {"0": {"share": [[26, 4], null]}}} as version 1 has it: the sources of all heads of a layer."""
    rows = {}
    for label, treated in layers.items():
        parts = [treated.get(str(group), {}).get("share", [None] * group_size) for group in range(groups)]
        rows[label] = [source for part in parts for source in part]
    return rows


def make_version_1(folder: Path, base: Path, commit: str = "135c47d") -> None:
    """Make a converted folder one of version 1, with the code of a commit. base: the folder of its base model."""
    for file in folder.glob("*.py"):
        file.unlink()
    with tarfile.open(ARCHIVE) as archive:
        for member in archive.getmembers():
            if member.isfile() and member.name.startswith(f"{commit}/") and "tokenization" not in member.name:
                (folder / Path(member.name).name).write_bytes(archive.extractfile(member).read())
    geometry = geometry_of_folder(base)
    layer = next(layer for layer in geometry.layers if layer.heads)
    config = json.loads((folder / "config.json").read_text())
    assert FAMILIES[config["model_type"].removeprefix("shared_attention_")]
    layers = config["shared_attention"]["layers"]
    config["shared_attention"] = {"layers": rows_of(layers, layer.heads // layer.groups, layer.groups)}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
