"""Names of layers where a model has several kinds of attention.

Inside of sa_convert all layers of a model are numbered through: first those of the encoder, then the decoder's own,
then its cross-attention. People, recipes and config.json name the stack (`encoder.3`, `decoder.3`, `decoder.cross.3`)
and count from 0 in each; a model with one kind of attention has plain numbers either way.
"""

Stacks = tuple[tuple[str, int], ...]
"""Name and number of layers of each stack, in the order in which layers are numbered; () where there is one kind."""


def place_of(stacks: Stacks, layer: int) -> tuple[str, int]:
    """The stack of a layer, and its number there."""
    number = layer
    for name, depth in stacks:
        if number < depth:
            return name, number
        number -= depth
    return "", layer


def layer_label(stacks: Stacks, layer: int) -> str:
    stack, number = place_of(stacks, layer)
    return f"{stack}.{number}" if stack else str(number)


def layer_of(stacks: Stacks, stack: str, number: int) -> int:
    """The layer with this number in a stack. Raises ValueError where there is no such stack."""
    if not stacks and not stack:
        return number
    before = 0
    for name, depth in stacks:
        if name == stack:
            return before + number
        before += depth
    raise ValueError(f"the model has no stack '{stack}'" if stack else "the model has several stacks")


def parse_label(label: object) -> tuple[str, int]:
    """ "decoder.cross.3" -> ("decoder.cross", 3); "27" or 27 -> ("", 27). Raises ValueError."""
    stack, _, number = str(label).rpartition(".")
    return stack, int(number)
