"""Makes room in a full cache: the oldest tokens after the first few go, and what stays moves to the positions that it
would have in the shorter text, instead of being computed again.

    places   0 ... K - 1   K ... K + d - 1   K + d ... n - 1
    before   kept first    gone              stay
    after    0 ... K - 1                     K ... n - d - 1, keys turned back by d positions

Values, keys that are cached before they are turned (low rank), and layers that only count need no turning. Windows of
KV groups and sliding layers have lost older tokens already: theirs stay, and move along.

What stays still knows of what went: hidden states of deeper layers were computed when it was there. docs/sessions.md
has what that makes of perplexity.
"""

from typing import Any

import torch

from sa_convert.errors import SessionError
from sa_convert.sessions.cache_layers import attentions_in, layers_of
from sa_convert.sessions.rotation import Rotation

SINKS = 4
"""Tokens at the beginning that stay. Without the first ones attention breaks down (StreamingLLM, arXiv 2309.17453)."""


def first_kept(cache: Any, sinks: int = SINKS) -> int:
    """So many tokens at the beginning stay: as asked, and at least those that windows keep as sinks."""
    return max([sinks, *(one.sinks for layer in cache.layers for one in _windows(layer).values())])


def make_room(cache: Any, model: Any, tokens: int, sinks: int = SINKS, rotation: Rotation | None = None) -> int:
    """Take `tokens` tokens out of the cache, those after the first `first_kept(cache, sinks)`, in place. Returns that
    number: the tokens of each row from there on are those that went.

    cache: dynamic or static, of rows without padding. rotation: of the model, if it is known already. Raises
    SessionError, before anything is changed, if there are not so many tokens, if the model's keys cannot be moved, or
    if a layer has lost what would have to stay.
    """
    layers, total = layers_of(cache), int(cache.get_seq_length())
    first = first_kept(cache, sinks)
    if not 0 < tokens <= total - first:
        raise SessionError(f"{tokens} of {total} tokens cannot go from the cache: the first {first} stay.")
    rotation = rotation or Rotation(model)
    attentions = attentions_in(model)
    with torch.inference_mode(_in_inference(layers)):
        moves = [
            _Move(rotation, layer, number, attentions.get(number), (total, first, tokens))
            for number, layer in enumerate(layers)
        ]
        for move in moves:
            move.check()
        for move in moves:
            move.make()
    return first


class _Move:
    """What happens to one layer. attention: the module of a converted model, or None. counts: tokens in the cache,
    those at the beginning that stay, those that go."""

    def __init__(
        self, rotation: Rotation, layer: Any, number: int, attention: Any, counts: tuple[int, int, int]
    ) -> None:
        self.rotation, self.layer, self.number, self.attention = rotation, layer, number, attention
        self.total, self.first, self.gone = counts

    def check(self) -> None:
        """Raises SessionError if the layer cannot do it."""
        if hasattr(self.layer, "recurrent_states"):
            raise SessionError(
                f"Layer {self.number} keeps one state of the whole text, from which no token can be taken: compute "
                "what is left of the text again."
            )
        real = getattr(getattr(self.layer, "parts", {}).get("window"), "real", None)
        if real is not None and not bool(real.all()):
            raise self._padded()
        if self._has_states() and self._held() < self.total and self._begin() < self.first + self.gone:
            raise self._lost()
        for one in _windows(self.layer).values():
            self._sources(one)

    def make(self) -> None:
        """In place."""
        layer, kept = self.layer, self.total - self.gone
        for window, one in _windows(layer).items():
            layer.parts["window"].kept[window] = self._moved(one)
        if self._has_states():
            held = self._held()
            if held == self.total:
                keys, values = (self._without(states) for states in (self._keys(self.first + self.gone), layer.values))
            else:
                keys, values = self._keys(0), layer.values
            if hasattr(layer, "max_cache_len"):
                stop = keys.shape[2]
                layer.keys[:, :, :stop], layer.values[:, :, :stop] = keys, values[:, :, :stop]
            else:
                layer.keys, layer.values = keys, values
        layer.__dict__.pop("shared_attention_rooms", None)
        for name in ("cumulative_length", "cumulative_length_int", "count"):
            length = vars(layer).get(name)
            if isinstance(length, torch.Tensor):
                length.fill_(min(int(length), kept))
            elif length is not None:
                setattr(layer, name, kept)

    def _has_states(self) -> bool:
        return getattr(self.layer, "keys", None) is not None and self.layer.keys.ndim == 4

    def _held(self) -> int:
        """Tokens whose states the layer of the cache holds: all, or the last ones."""
        held = int(self.layer.keys.shape[2])
        return min(held, self.total)

    def _begin(self) -> int:
        return self.total - self._held()

    def _without(self, states: torch.Tensor) -> torch.Tensor:
        return torch.cat([states[:, :, : self.first], states[:, :, self.first + self.gone : self.total]], dim=2)

    def _keys(self, start: int) -> torch.Tensor:
        """What is in the slot of keys, with those from `start` on turned."""
        slot = self.layer.keys
        numbers, groups = self._turned_numbers(slot)
        if not numbers:
            return slot
        part = slot[:, :, start : self.total, :numbers]
        if groups > 1:  # one wide head that holds the keys of several KV groups side by side
            keys = part[:, 0].unflatten(-1, (groups, -1)).transpose(1, 2)
            keys = self.rotation.back(self.number, keys, self.gone).transpose(1, 2).flatten(2)[:, None]
        else:
            keys = self.rotation.back(self.number, part, self.gone)
        keys = torch.cat([keys, slot[:, :, start : self.total, numbers:]], dim=-1) if numbers < slot.shape[-1] else keys
        return torch.cat([slot[:, :, :start], keys], dim=2)

    def _turned_numbers(self, slot: torch.Tensor) -> tuple[int, int]:
        """How many numbers of each token in the slot of keys are turned, and of how many KV groups a head of the slot
        has them. A layer that borrows all keys has values there; low-rank keys come after those that are whole."""
        plan = getattr(self.attention, "plan", None)
        if plan is None:
            return slot.shape[-1], 1
        held = getattr(self.layer, "held", None)
        groups = [group for group in plan.own_groups if held is None or group in held]
        if not groups:
            return 0, 1
        low_rank = getattr(self.attention, "low_rank", None)
        if low_rank is None or not low_rank.expands:  # else full keys lie side by side
            return slot.shape[-1], 1
        whole = [group for group in groups if group not in low_rank.ranks]
        return len(whole) * low_rank.size, max(len(whole), 1)

    def _sources(self, one: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """For each slot of a window, sinks first, the place that it will hold (-1: none), and the slot that holds it
        now. Raises SessionError if that is gone."""
        total, kept, device = int(one.length), int(one.length) - self.gone, one.keys.device
        if one.places is not None:
            sinks = one.places[:, : one.sinks]
            if not bool((sinks == torch.arange(one.sinks, device=device)).all()):
                raise self._padded()
        ring = torch.arange(one.window, device=device)
        places = kept - 1 - (kept - 1 - one.sinks - ring) % one.window
        places = torch.where(places < one.sinks, -1, places)
        before = torch.where(places < self.first, places, places + self.gone)
        if bool(((places >= 0) & (before < max(one.sinks, total - one.window))).any()):
            raise self._lost()
        slots = one.sinks + (before - one.sinks) % one.window
        sinks = torch.arange(one.sinks, device=device)
        return torch.cat([sinks, places]), torch.cat([sinks, torch.where(places < 0, one.sinks, slots)])

    def _moved(self, one: Any) -> Any:
        """A window at its new places. It gives none of its last tokens back until new ones have come."""
        from dataclasses import replace

        places, slots = self._sources(one)
        room = one.keys.shape[2] - len(slots)
        keys, values = (
            torch.nn.functional.pad(states[:, :, slots], (0, 0, 0, room)) for states in (one.keys, one.values)
        )
        turned = self.rotation.back(self.number, keys, self.gone)
        moves = torch.nn.functional.pad(places >= self.first, (0, room))[:, None]
        keys, kept = torch.where(moves, turned, keys), int(one.length) - self.gone
        every = None
        if one.places is not None:
            every = torch.nn.functional.pad(places, (0, room), value=-1).expand(len(keys), -1).clone()
        if isinstance(one.length, torch.Tensor):  # tensors of a static cache keep their addresses
            one.keys.copy_(keys)
            one.values.copy_(values)
            one.places.copy_(every)
            one.length.fill_(kept)
            return one
        lost = max(one.sinks, kept - one.window)
        return replace(one, keys=keys, values=values, places=every, length=kept, lost=lost)

    def _lost(self) -> SessionError:
        return SessionError(
            f"Layer {self.number} keeps fewer tokens than would have to stay: let fewer than {self.gone} tokens go at "
            "a time, or compute what is left of the text again."
        )

    def _padded(self) -> SessionError:
        return SessionError("Rows of the cache are padded: make room only in a cache whose rows are equally long.")


def _windows(layer: Any) -> dict[Any, Any]:
    """What windows keep in a layer, by sinks and tokens; see `sa_convert.treatments.window.runtime`."""
    return getattr(getattr(layer, "parts", {}).get("window"), "kept", {})


def _in_inference(layers: list[Any]) -> bool:
    """Whether the cache was made in inference mode, in which alone its tensors may be written to."""
    states = (getattr(layer, "keys", None) for layer in layers)
    return any(isinstance(one, torch.Tensor) and one.is_inference() for one in states)
