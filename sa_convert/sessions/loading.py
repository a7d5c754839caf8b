"""Reads a conversation's cache from its file again, for the model that filled it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sa_convert.errors import SessionError
from sa_convert.models.arguments import dynamic_cache
from sa_convert.sessions.cache_layers import restored
from sa_convert.sessions.identity import ModelIdentity, identity_of
from sa_convert.sessions.read_ahead import read_ahead
from sa_convert.sessions.session_file import metadata_of, names_in_order


@dataclass(frozen=True)
class StoredSession:
    """A conversation as it was kept."""

    cache: Any
    """Ready for the model. Keys and values of a dynamic cache are still in the file, and read when they are used."""

    tokens: torch.Tensor
    """(B, T) int64. The first `length` of a row are in the cache."""

    length: int
    mask: torch.Tensor | None
    """(B, T) bool, which tokens are real, or None if all are."""

    notes: Mapping[str, Any]
    bytes: int
    """Of the file."""


def load(
    file: str | Path,
    model: Any,
    *,
    ahead: bool = True,
    identity: ModelIdentity | None = None,
) -> StoredSession:
    """The session in `file`, for `model`.

    The file is mapped into memory: layers are read when the model comes to them, or a little before, by a thread, if
    `ahead`. identity: of the model, if it is known already.
    Raises SessionError, in one sentence, for a file of another model, plan, dtype or release of transformers, one that
    is no session, and one that was cut short.
    """
    file = Path(file)
    metadata = metadata_of(file)
    _check(file, metadata, identity or identity_of(model))
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            names = names_in_order(list(opened.keys()))
            tensors = {name: opened.get_tensor(name) for name in names}
        if ahead:
            read_ahead(file)
        tokens, mask = tensors.pop("tokens").long(), tensors.pop("mask", None)
        fresh = _fresh(metadata, model)
        cache = restored(fresh, json.loads(metadata["layers"]), tensors, model)
        notes = json.loads(metadata["notes"])
        return StoredSession(cache, tokens, int(metadata["length"]), mask, notes, file.stat().st_size)
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        raise SessionError(f"{file}: its cache does not fit this model, or the file is damaged: begin anew.") from error


def told_in(file: str | Path) -> tuple[torch.Tensor, Mapping[str, Any]]:
    """Tokens (B, T) and notes of a session, whatever the model. Raises SessionError."""
    from safetensors import SafetensorError, safe_open

    metadata = metadata_of(Path(file))
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor("tokens").long(), json.loads(metadata["notes"])
    except (SafetensorError, LookupError, ValueError, OSError) as error:
        raise SessionError(f"{file}: the file is damaged: begin anew.") from error


def _check(file: Path, metadata: Mapping[str, str], identity: ModelIdentity) -> None:
    import transformers

    try:
        kept = ModelIdentity(*(metadata[key] for key in ("model", "plan", "dtype", "revision")))
        release = metadata["transformers"]
    except KeyError as error:
        raise SessionError(f"{file}: its header has no {error.args[0]}: the file is damaged, so begin anew.") from error
    if (other := identity.differs_from(kept)) is not None:
        raise SessionError(f"{file}: its cache was filled by {other}: give the model that began the conversation.")
    if release.split(".")[:2] != transformers.__version__.split(".")[:2]:
        raise OtherRelease(
            f"{file}: its cache is one of transformers {release}, and this is {transformers.__version__}: install that "
            "release, or compute the conversation again."
        )


class OtherRelease(SessionError):
    """The cache is of use in another release of transformers only; tokens and notes are of use everywhere."""


def _fresh(metadata: Mapping[str, str], model: Any) -> Any:
    from transformers import StaticCache

    if metadata["cache"] != "static":
        return dynamic_cache(model)
    config = model.config.get_text_config(decoder=True)
    return StaticCache(config=config, max_cache_len=int(metadata["room"]))
