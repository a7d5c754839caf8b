"""A model to evaluate, whatever the user calls it, and whether code in its folder may run.

An ordinary model runs by the code of transformers. A converted one runs by the code in its folder, as its users will
run it; that is done without asking only if this code is, byte for byte, what this version of sa-convert writes.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sa_convert.console.progress import announce, notes
from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.domain.model import RunOptions
from sa_convert.domain.report import BaseModel
from sa_convert.errors import CheckpointError
from sa_convert.families.family import PREFIX
from sa_convert.models.load import Loaded, load_base, load_converted, load_tokenizer
from sa_convert.models.placement import Placement
from sa_convert.models.quiet import keep_module_cache_clean
from sa_convert.output.disk_space import require_space
from sa_convert.read.open_model import complete, open_model
from sa_convert.read.remote_code import code_references, refuse_code_elsewhere, shown_code


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that can be loaded: safetensors in a folder."""

    name: str
    """What results call it."""

    folder: Path
    config: Mapping[str, Any]
    """config.json."""

    converted: bool
    """It runs by the code in its folder."""

    trusted: bool
    """The user lets any code in it run."""

    def load(self, placement: Placement) -> AbstractContextManager[Loaded]:
        """Raises CheckpointError."""
        if self.converted:
            return load_converted(self.folder, placement, None, f"The converted model {self.name}")
        return load_base(self.folder, placement, self.trusted)

    def tokenizer(self) -> Any:
        """Raises DataError."""
        return load_tokenizer(self.folder, self.converted or self.trusted, "")


def open_subject(
    reference: str, workspace: Path, run: RunOptions, foreign_code: Callable[[Checkpoint], str | None]
) -> Subject:
    """The model that the user calls `reference`: a folder, ordinary or converted, a .gguf file, or one on the Hub.

    foreign_code: says what of the code in a converted folder is not ours, or None (`sa_convert.plan.audited`).
    workspace: where a model that is not in safetensors is written as such. What of a model on the Hub is not in the
    cache is downloaded; what code is trusted is told on stderr. Raises CheckpointError, UnsupportedModelError,
    OutputError; CheckpointError, too, for code in the folder that is not ours and would have to run, unless it is
    trusted.
    """
    keep_module_cache_clean()
    from transformers import CONFIG_MAPPING

    checkpoint = open_model(reference, None, run.stored_dtype)
    notes(checkpoint.identity, checkpoint.notes)
    converted = str(checkpoint.config.get("model_type")).startswith(PREFIX)
    named = not converted and bool(list(code_references(checkpoint)))
    own = checkpoint.config.get("auto_map") and checkpoint.config.get("model_type") not in CONFIG_MAPPING
    if named and own and not run.trust:
        raise CheckpointError(
            f"{reference}: transformers does not know this type of model, but the folder names code that does: look at "
            "the code, then use --trust-remote-code to run it."
        )
    if run.trust and named:
        refuse_code_elsewhere(checkpoint)
        announce(f"trusting {shown_code(checkpoint)}")
    if not checkpoint.is_safetensors:
        if converted:
            raise CheckpointError(f"{reference}: a converted model has safetensors; convert its base model again.")
        needed = checkpoint.weight_bytes
        require_space(workspace.parent, needed, f"The weights of {reference} as safetensors", "a folder with those")
    # The code of a converted model is compared with ours before it runs.
    trusted = replace(checkpoint, trusted=converted or (run.trust and named))
    checkpoint = complete(trusted, reference, workspace, run.stored_dtype)
    if converted and not run.trust and (fault := foreign_code(checkpoint)):
        raise CheckpointError(
            f"{reference}: {fault}, and loading the model would run "
            "it: look at the code, then use --trust-remote-code, or convert the model again."
        )
    return Subject(
        name=BaseModel.of(checkpoint.identity).id,
        folder=checkpoint.folder,
        config=checkpoint.config,
        converted=converted,
        trusted=run.trust,
    )
