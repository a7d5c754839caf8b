"""Times the turns of a conversation, with the cache that was kept in a file and without it."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from sa_convert.domain.benchmark import Spread
from sa_convert.domain.turn_times import TurnTime
from sa_convert.measure.quality.cache_bytes import held
from sa_convert.models.arguments import cache_keyword, dynamic_cache, last_logits_only
from sa_convert.models.device import input_device
from sa_convert.output.disk_space import require_space
from sa_convert.sessions.loading import load
from sa_convert.sessions.saving import save


class ConversationTimer:
    """A model that is told random tokens and answers greedily, twice: in one conversation the cache never leaves
    memory, in the other it is written into a file after each turn, and nothing else goes on to the next.

    said: (turns, tokens), the user's messages. more: (turns, tokens), how answers go on after the tokens that the model
    says itself; they are only read. answer: tokens that it says. step: called once for each run that is timed and for
    each turn.
    """

    def __init__(
        self, model: Any, said: torch.Tensor, more: torch.Tensor, answer: int, step: Callable[[], Any]
    ) -> None:
        device = input_device(model)
        self.model, self.said, self.more, self.answer, self.step = model, said.to(device), more.to(device), answer, step
        self.last = last_logits_only(model)

    @torch.inference_mode()
    def turns(self, file: Path, repeats: int) -> tuple[TurnTime, ...]:
        """file: of the session; it is there afterwards. Raises OutputError if all turns will not fit on the disk."""
        tokens = self.said[:1, :0]
        memory, found = dynamic_cache(self.model), []
        for number, (message, more) in enumerate(zip(self.said, self.more[:, None], strict=True)):
            history, tokens = tokens.shape[1], torch.cat([tokens, message[None]], dim=1)
            runs: list[tuple[float, float, float]] = []
            kept: Any = None
            for _ in range(repeats):
                recomputed, _ = self._first(dynamic_cache(self.model), tokens)
                loading = reading = 0.0
                if number:
                    loading, reading, kept = self._from(file, tokens)
                runs.append((recomputed, loading, loading + reading))
                self.step()
            wanted = self._continued(memory, tokens)
            cache, said = kept or (dynamic_cache(self.model), None)
            same = torch.equal(self._continued(cache, tokens, said), wanted)
            tokens = torch.cat([tokens, wanted, more], dim=1)
            for one in (memory, cache) if more.numel() else ():
                self._next(one, tokens[:, int(one.get_seq_length()) :])
            size = held(cache).needed
            if not number:
                # The last session takes that of all turns, and the one before is there until it is whole.
                require_space(file.parent, size * (2 * len(self.said) - 1), "Sessions", "a shorter conversation")
            began = time.perf_counter()
            written = save(cache, tokens, file, self.model)
            writing = time.perf_counter() - began
            whole, loads, read = zip(*runs, strict=True)
            found.append(
                TurnTime(
                    history=history,
                    new=self.said.shape[1],
                    recomputed=Spread(whole),
                    kept=Spread(read) if number else None,
                    loading=Spread(loads) if number else None,
                    writing=writing,
                    file_bytes=written,
                    cache_bytes=size,
                    same_tokens=same,
                )
            )
            self.step()
        return tuple(found)

    def _from(self, file: Path, tokens: torch.Tensor) -> tuple[float, float, tuple[Any, torch.Tensor]]:
        """Seconds of loading, and of the rest to the first token; the cache then, and that token (1, 1). The file comes
        from the disk, as on another day, as far as the system lets us ask for that."""
        forget(file)
        began = time.perf_counter()
        session = load(file, self.model)
        loading = time.perf_counter() - began
        reading, token = self._first(session.cache, tokens)
        return loading, reading, (session.cache, token)

    def _first(self, cache: Any, tokens: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Seconds to the first token after `tokens` (1, T), of which the cache has the first ones; and it (1, 1)."""
        began = time.perf_counter()
        token = self._next(cache, tokens[:, int(cache.get_seq_length()) :])
        token.item()  # waits for a GPU
        return time.perf_counter() - began, token

    def _continued(self, cache: Any, tokens: torch.Tensor, first: torch.Tensor | None = None) -> torch.Tensor:
        """The answer, (1, answer), all but its last token read. first: its first token, if it is known."""
        said = [self._first(cache, tokens)[1] if first is None else first]
        while len(said) < self.answer:
            said.append(self._next(cache, said[-1]))
        return torch.cat(said, dim=1)

    def _next(self, cache: Any, tokens: torch.Tensor) -> torch.Tensor:
        output = self.model(input_ids=tokens, use_cache=True, **{cache_keyword(self.model): cache}, **self.last)
        return output.logits[:, -1:].argmax(-1)


def forget(file: Path) -> None:
    """Ask the system to drop what it has in memory of a file that is on the disk."""
    with suppress(OSError, AttributeError):
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
