"""Writes the cache of a conversation into a file, while the next turn is typed if that is asked for."""

import json
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sa_convert.errors import SessionError
from sa_convert.sessions.cache_layers import is_static, room_of, told
from sa_convert.sessions.identity import ModelIdentity, identity_of
from sa_convert.sessions.session_file import FORMAT, check_replaceable, write


class Saving:
    """A session that a thread is writing, layer by layer. The cache must not be given to the model before `wait`."""

    def __init__(self, file: Path, metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
        self.file = file
        self._bytes, self._error = 0, None  # type: int, BaseException | None
        self._thread = threading.Thread(target=self._run, args=(metadata, tensors), name="session", daemon=False)
        self._thread.start()

    def _run(self, metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
        try:
            self._bytes = write(self.file, metadata, tensors)
        except BaseException as error:  # raised where somebody waits
            self._error = error

    def wait(self) -> int:
        """The bytes of the file, once it is there. Raises OutputError if it could not be written."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._bytes


def save(
    cache: Any,
    tokens: torch.Tensor,
    file: str | Path,
    model: Any,
    **more: Any,
) -> int:
    """Write what `model` has cached into `file`, and return the bytes of that file; see `save_later`."""
    return save_later(cache, tokens, file, model, **more).wait()


def save_later(
    cache: Any,
    tokens: torch.Tensor,
    file: str | Path,
    model: Any,
    *,
    mask: torch.Tensor | None = None,
    notes: Mapping[str, Any] | None = None,
    identity: ModelIdentity | None = None,
) -> Saving:
    """Begin to write, and return at once. An earlier session in `file` is there until the new one is whole.

    cache: dynamic or static, with the model's own layers, or those of a converted model. tokens: (B, T), those of the
    cache first; more may follow, such as the last one that was generated, which no model has read yet. mask: (B, T),
    which tokens are real, if rows are padded. notes: JSON that belongs to the session. identity: of the model, if it
    is known already. Raises SessionError for a cache that cannot be kept, or if something else is in `file`.
    """
    file = Path(file)
    layers, tensors = told(cache)
    length = int(cache.get_seq_length())
    if tokens.ndim != 2 or tokens.shape[1] < length:
        raise SessionError(
            f"The cache holds {length} tokens a row, but tokens of shape {tuple(tokens.shape)} are given: give all "
            "that the model has read, as (rows, tokens)."
        )
    check_replaceable(file)
    tensors["tokens"] = tokens.to(torch.int32)
    if mask is not None and not bool(mask.bool().all()):
        tensors["mask"] = mask.bool()
    return Saving(file, _metadata(cache, layers, length, notes, identity or identity_of(model)), tensors)


def _metadata(
    cache: Any, layers: list[dict[str, Any]], length: int, notes: Mapping[str, Any] | None, identity: ModelIdentity
) -> dict[str, str]:
    import transformers

    kind = {"cache": "static", "room": str(room_of(cache))} if is_static(cache) else {"cache": "dynamic"}
    return {
        "format": FORMAT,
        **asdict(identity),
        "transformers": transformers.__version__,
        **kind,
        "length": str(length),
        "layers": json.dumps(layers, separators=(",", ":")),
        "notes": json.dumps(notes or {}, ensure_ascii=False, separators=(",", ":")),
    }
