"""What a healing keeps in a folder of its own while it runs: the curve, the best state, and what it was begun with."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.domain.healed import Judgement
from sa_convert.errors import OutputError

FILE, BEST, WRITTEN = "healing.json", "best.safetensors", "written.safetensors"
_HEAD = 1 << 20


def fingerprint(checkpoint: Checkpoint) -> str:
    """Of a model's files: configuration, headers, the first megabyte of each file's tensors, and sizes."""
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for shard in checkpoint.shards:
        digest.update(f"{shard.file.name} {shard.file.stat().st_size}".encode())
        with shard.file.open("rb") as file:
            digest.update(file.read(_HEAD))
            for tensor in shard.tensors:
                file.seek(tensor.start)
                digest.update(file.read(min(tensor.bytes, 4096)))
    return digest.hexdigest()


@dataclass
class HealingState:
    """folder: made if need be. begun: settings and models, which a run that goes on has to share.

    curve: judgements, with the step of each. seconds: that were spent. resumed: whether it goes on with an earlier run.
    """

    folder: Path
    begun: Mapping[str, Any]
    curve: list[tuple[int, Judgement]] = field(default_factory=list)
    base: Judgement | None = None
    best: int | None = None
    seconds: float = 0.0
    resumed: bool = False

    @classmethod
    def open(cls, folder: Path, begun: Mapping[str, Any], resume: bool) -> "HealingState":
        """Raises OutputError if there is a run that should go on, or none, or another one."""
        begun = json.loads(json.dumps(begun))
        file = folder / FILE
        if not resume:
            if file.exists() and any(folder.glob("checkpoint-*")):
                raise OutputError(
                    f"{folder}: holds a healing that was interrupted: use --resume to go on, or remove that folder."
                )
            folder.mkdir(parents=True, exist_ok=True)
            return cls(folder, begun)
        if not file.exists():
            raise OutputError(f"{folder}: there is no interrupted healing to go on with: leave out --resume.")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            other = [key for key in begun if content["begun"].get(key) != begun[key]]
            if other:
                raise OutputError(
                    f"{folder}: the interrupted healing was begun with other {' and '.join(other)}: give the same, "
                    "or remove that folder to begin anew."
                )
            curve = [(item["step"], Judgement.from_json(item)) for item in content["curve"]]
            base = content["base"] and Judgement.from_json(content["base"])
            return cls(folder, begun, curve, base, content["best"], content["seconds"], True)
        except (ValueError, LookupError, TypeError) as error:
            raise OutputError(f"{file}: is damaged: remove the folder to begin anew.") from error

    @property
    def checkpoint(self) -> Path | None:
        """The newest that is complete."""
        found = [path for path in self.folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
        return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def forget_after(self, step: int) -> None:
        """A run goes on from this step: what was judged later will be again."""
        self.curve = [item for item in self.curve if item[0] <= step]
        if self.best is not None and self.best >= len(self.curve):
            self.best = None

    def keep_best(self, state: Mapping[str, torch.Tensor]) -> None:
        """A state that is better than all before."""
        from safetensors.torch import save_file

        part = self.folder / f"{BEST}.part"
        save_file({name: value.contiguous() for name, value in state.items()}, part)
        part.replace(self.folder / BEST)

    def best_state(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / BEST)

    def written(self, write: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
        """Rows of text that `write` makes, which takes minutes, and the seconds that it took: those of the run that
        goes on, if they are there."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        file = self.folder / WRITTEN
        if self.resumed and file.exists():
            with safe_open(file, framework="pt") as kept:
                return kept.get_tensor("rows"), float((kept.metadata() or {}).get("seconds", 0.0))
        begun = time.monotonic()
        rows = write()
        spent = time.monotonic() - begun
        part = self.folder / f"{WRITTEN}.part"
        save_file({"rows": rows.contiguous()}, part, metadata={"seconds": f"{spent:.3f}"})
        part.replace(file)
        return rows, spent

    def save(self, seconds: float) -> None:
        self.seconds = seconds
        content = {
            "begun": self.begun,
            "seconds": seconds,
            "best": self.best,
            "base": self.base and _exact(self.base),
            "curve": [{"step": step, **_exact(judgement)} for step, judgement in self.curve],
        }
        part = self.folder / f"{FILE}.part"
        part.write_text(json.dumps(content, indent=1), encoding="utf-8")
        part.replace(self.folder / FILE)


def _exact(judgement: Judgement) -> dict[str, Any]:
    """All digits: a run that goes on has to judge as the whole one would."""
    rounded = judgement.to_json()
    exact = {"divergence": dict(judgement.divergence), "text": dict(judgement.text), "training": judgement.training}
    return rounded | exact | {"copying": {str(distance): loss for distance, loss in judgement.copying.items()}}
