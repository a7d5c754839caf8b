"""How layers lend attention to later ones within one forward pass.

Letters in shape comments: B batch, O own query heads of the lender, T query tokens, S cached tokens, D head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass

import torch

# The keyword under which the exchange travels through the model's forward.
EXCHANGE = "shared_attention"

# For families whose forward passes no keywords on: the exchange of the pass that this context is in.
_CURRENT: ContextVar["Exchange | None"] = ContextVar("shared_attention_exchange", default=None)


@dataclass(frozen=True)
class Loan:
    """What a source layer lends: the attention of its own heads, in their order.

    query: (B, O, T, D); key: (B, own groups, S, D), cache included; weights: probabilities (B, O, T, S) in blocks of
    tokens (see `shared_attention_weights`), or None in the queries form;
    arguments: what the family passed to the attention function besides (scaling, window, softcap, sinks, dropout);
    mask: (B, O, T, S) where the mask differs by head (ALiBi, relative positions), else None.
    """

    query: torch.Tensor
    key: torch.Tensor
    weights: list[torch.Tensor] | None
    arguments: dict
    mask: torch.Tensor | None = None


class Exchange:
    """The loans of one forward pass, by stack and layer."""

    def __init__(self):
        self._loans = {}

    def lend(self, stack: str, layer: int, loan: Loan) -> None:
        # A checkpointed layer lends again when it is computed again; the first loan is the one in the graph.
        self._loans.setdefault((stack, layer), loan)

    def borrow(self, stack: str, layer: int) -> Loan:
        return self._loans[stack, layer]

    def settle(self, stack: str, layers: tuple[int, ...]) -> None:
        """Forget loans that no later layer needs. With gradients, a layer that is computed again still needs them."""
        if not torch.is_grad_enabled():
            for layer in layers:
                self._loans.pop((stack, layer), None)


def current_exchange() -> Exchange | None:
    return _CURRENT.get()


def open_by_keyword(module, args, kwargs):
    """Before the forward of a stack: a new exchange, which its layers pass on."""
    kwargs.setdefault(EXCHANGE, Exchange())
    return args, kwargs


def append_to_positions(module, args, output):
    """After the rotary embedding: a new exchange beside cosines and sines."""
    return (*output, Exchange())


def open_by_context(stack) -> None:
    """Give every forward pass of a stack an exchange of its own, in the context (thread or task) that it runs in."""

    def enter(module, args):
        _CURRENT.set(Exchange())

    def leave(module, args, output):
        _CURRENT.set(None)

    stack.register_forward_pre_hook(enter)
    stack.register_forward_hook(leave, always_call=True)


def checkpoint_contexts() -> tuple:
    """For torch.utils.checkpoint: a layer that is computed again, maybe in another thread, finds the same exchange."""
    return nullcontext(), _within(_CURRENT.get())


@contextmanager
def _within(exchange: Exchange | None) -> Iterator[None]:
    token = _CURRENT.set(exchange)
    try:
        yield
    finally:
        _CURRENT.reset(token)
