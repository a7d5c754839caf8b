"""How layers lend attention to later ones within one forward pass.

An exchange belongs to one pass of one stack. It travels as a keyword, beside the rotary embeddings, or, in families
that pass on neither, in a variable of the thread: Dynamo traces `threading.local`, but no context variable.

Letters in shape comments: B batch, O own query heads of the lender, T query tokens, S cached tokens, D head size.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import wraps

import torch

# The keyword under which the exchange travels through the model's forward.
EXCHANGE = "shared_attention"

# `open`: (exchange, what was open before it) of the innermost pass that this thread is in, or None.
_THREAD = threading.local()

# The attribute of a model that is itself a stack: how its forward opens exchanges.
_OPENS = "_opens_exchange"

# The attribute under which the input of a layer keeps what that layer borrows if it is computed again.
_AGAIN = "_shared_attention"


def _apart(tensor):
    """The same numbers outside the graph, for autograd to save as many tensors of them as the first time."""
    return None if tensor is None else tensor.detach().requires_grad_(tensor.requires_grad)


def _computing_again() -> bool:
    """Whether a checkpointed layer runs once more. A torch without the name merely keeps more memory for longer."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and not torch.compiler.is_compiling() and task() >= 0


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

    def apart(self) -> "Loan":
        weights = None if self.weights is None else [_apart(block) for block in self.weights]
        return replace(self, query=_apart(self.query), key=_apart(self.key), weights=weights, mask=_apart(self.mask))


class Exchange:
    """The loans of one forward pass, by stack and layer.

    Once the pass is over, layers may still run: checkpointed ones, which are computed again, and those that a tool
    replays one by one on inputs that it caught (as GPTQ and AWQ do). Then loans are kept, and a replayed lender lends
    anew. `inputs` are those of replayed lenders, to notice one exchange that serves several inputs in turn.
    """

    def __init__(self, over: bool = False):
        self.over = over
        self._loans, self._inputs, self._mixed, self._again = {}, {}, set(), None

    def lend(self, stack: str, layer: int, loan: Loan) -> None:
        place = stack, layer
        # The first loan of a checkpointed layer is the one in the graph.
        if place not in self._loans or not _computing_again():
            self._loans[place] = loan
            if self._again not in (None, self):
                self._again.lend(stack, layer, loan.apart())

    def borrow(self, stack: str, layer: int) -> Loan:
        """Raises RuntimeError where nothing was lent, or where it is not clear for which input."""
        place = stack, layer
        if place in self._mixed:
            raise RuntimeError(
                f"shared_attention: layer {layer} of one forward pass was replayed on several inputs before the layers "
                "that reuse its attention. Replay each input with the keyword arguments of its own pass, or run the "
                "whole model."
            )
        self._inputs.pop(place, None)
        if place not in self._loans:
            raise RuntimeError(
                f"shared_attention: layer {layer} lends its attention to later layers, and has not run in this pass. "
                "Run the whole model, or every layer in order (checkpointing needs use_reentrant=False)."
            )
        return self._loans[place]

    def settle(self, stack: str, layers: tuple[int, ...]) -> None:
        """Forget loans that no later layer needs. With gradients, a layer that is computed again still needs them."""
        if not self.over and not torch.is_grad_enabled():
            for layer in layers:
                self._loans.pop((stack, layer), None)

    def see(self, stack: str, layer: int, states: torch.Tensor) -> None:
        """What a layer that lends is about to run on, (B, T, hidden), when it is replayed."""
        place = stack, layer
        before = self._inputs.get(place)
        known = before is not None and states is not None
        if known and (before.shape != states.shape or not torch.equal(before, states)):
            self._mixed.add(place)
        self._inputs[place] = states

    def again(self) -> "Exchange":
        """What layers borrow from when they are computed again: these loans, apart from the graph that their inputs
        are in, which else would keep itself alive."""
        if self._again is None:
            self._again = Exchange(over=True)
            self._again._again = self._again
            self._again._loans = {place: loan.apart() for place, loan in self._loans.items()}
        return self._again


def current_exchange() -> Exchange | None:
    """That of the innermost pass that this thread is in."""
    inner = getattr(_THREAD, "open", None)
    return None if inner is None else inner[0]


def _enter(exchange: Exchange | None) -> None:
    _THREAD.open = exchange, getattr(_THREAD, "open", None)


def leave(module, args, output) -> None:
    """After a forward pass that entered an exchange, an exception included: back to the one around it."""
    if getattr(_THREAD, "open", None) is not None:
        _THREAD.open = _THREAD.open[1]


def _enter_stack(stack, args) -> None:
    _enter(Exchange())


def _leave_stack(stack, args, output) -> None:
    exchange = current_exchange()
    if exchange is not None:
        exchange.over = True
    leave(stack, args, output)


def _states_in(args, kwargs):
    """The states (B, T, hidden) that a layer is called with, whatever their name is, or None."""
    given = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.ndim == 3)
    return next(given, None)


def _enter_layer(layer, args, kwargs) -> None:
    """A layer that a wrapper checkpoints is computed again outside its stack, maybe in another thread, but on the same
    tensor: whoever checkpoints it keeps that."""
    exchange = current_exchange()
    if not torch.compiler.is_compiling():
        states = _states_in(args, kwargs)
        if exchange is None:
            exchange = getattr(states, _AGAIN, None)
        elif states is not None and torch.is_grad_enabled():
            setattr(states, _AGAIN, exchange.again())
    _enter(exchange)


def opening(forward):
    """The forward of a model class. If the model is itself a stack that opens exchanges, it opens them here and not by
    hooks: some callers (sentence-transformers, serving engines) call `forward` and not the model."""

    @wraps(forward)
    def run(self, *args, **kwargs):
        way = self.__dict__.get(_OPENS)
        if way is None or EXCHANGE in kwargs:
            return forward(self, *args, **kwargs)
        if way == "keyword":
            kwargs[EXCHANGE] = Exchange()
        else:
            _enter_stack(self, args)
        try:
            return forward(self, *args, **kwargs)
        finally:
            if way == "keyword":
                kwargs[EXCHANGE].over = True
            else:
                _leave_stack(self, args, None)

    return run


def open_by_thread(stack, shares, is_model: bool) -> None:
    """Give every forward pass of a stack an exchange of its own, in the thread that it runs in.

    shares: whether a module is one that lends or borrows. Every module around such a one may be checkpointed.
    is_model: whether the stack is the model itself (see `opening`)."""
    _open_in_thread(stack, is_model)
    for module in stack.modules():
        if module is not stack and any(shares(part) for part in module.modules()):
            module.register_forward_pre_hook(_enter_layer, with_kwargs=True)
            module.register_forward_hook(leave, always_call=True)


def checkpoint_contexts() -> tuple:
    """For torch.utils.checkpoint around the forward of a layer, which hooks do not see."""
    exchange = current_exchange()
    return nullcontext(), _within(None if exchange is None else exchange.again())


@contextmanager
def _within(exchange: Exchange | None) -> Iterator[None]:
    _enter(exchange)
    try:
        yield
    finally:
        leave(None, (), None)


def _give_keyword(stack, args, kwargs):
    return args, {EXCHANGE: Exchange(), **kwargs}


def _leave_keyword(stack, args, kwargs, output) -> None:
    if EXCHANGE in kwargs:
        kwargs[EXCHANGE].over = True


def _open_in_thread(stack, is_model: bool) -> None:
    if is_model:
        setattr(stack, _OPENS, "thread")
        return
    stack.register_forward_pre_hook(_enter_stack)
    stack.register_forward_hook(_leave_stack, always_call=True)


def open_by_keyword(stack, is_model: bool) -> None:
    """Give every forward pass of a stack an exchange as a keyword, which its layers pass on."""
    if is_model:
        setattr(stack, _OPENS, "keyword")
        return
    stack.register_forward_pre_hook(_give_keyword, with_kwargs=True)
    stack.register_forward_hook(_leave_keyword, with_kwargs=True, always_call=True)


def _append_to_positions(rotary, args, output):
    return (*output, current_exchange() or Exchange(over=True))


def open_by_positions(stack, rotary, is_model: bool) -> None:
    """Give every forward pass of a stack an exchange beside cosines and sines, which its layers pass on."""
    _open_in_thread(stack, is_model)
    rotary.register_forward_hook(_append_to_positions)


def see_input(stack: str, number: int, layer, args, kwargs) -> None:
    """Before the forward of a layer that lends: tell an exchange whose pass is over what is replayed."""
    for value in kwargs.values():
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Exchange) and item.over and not _computing_again():
                item.see(stack, number, _states_in(args, kwargs))
