"""Tiny models with fewer KV groups in some layers; and the reference: the unmodified base, whose keys and values are
projected onto what fewer KV groups can hold. Each projection is computed in another way than in sa_convert, by singular
values of what the text's inputs make, and shares no code with it but the calibration text."""

from contextlib import contextmanager

import torch

from sa_convert.domain.recipe import Calibration
from sa_convert.families.table import FAMILIES
from sa_convert.observe.session import open_session
from sa_convert.read.model_of import model_of
from sa_convert.read.open_model import open_model
from support.tiny_models import attentions_of

LENGTH = 32


def inputs_of(folder, layers):
    """What goes into the attention of layers on calibration text: (tokens, hidden + 1), a 1 at the end; each row
    multiplied with the root of its sequence's weight."""
    found = {layer: [] for layer in layers}
    calibration = Calibration(sequences=6, length=LENGTH)
    with open_session(model_of(open_model(str(folder))), calibration, treatments=()) as session, torch.no_grad():
        base, handles = session.probe.model, []
        attentions = attentions_of(base, FAMILIES[session.model.family.model_type])
        for layer in layers:
            project = attentions[layer].k_proj
            handles.append(project.register_forward_pre_hook(lambda _, args, at=layer: found[at].append(args[0][0])))
        for sample in session.samples.fit:
            before = {layer: len(rows) for layer, rows in found.items()}
            base(**sample.inputs(base).kwargs)
            for layer, rows in found.items():
                states = torch.cat([rows[before[layer]], torch.ones(len(rows[before[layer]]), 1)], dim=1)
                rows[before[layer] :] = [states.double() * sample.weight**0.5]
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(rows) for layer, rows in found.items()}


def rows_of(projection):
    """(rows, hidden + 1)"""
    weight = projection.weight.detach().double()
    bias = projection.bias
    return torch.cat([weight, torch.zeros(len(weight), 1) if bias is None else bias.detach().double()[:, None]], dim=1)


def projections(attention, inputs, groups, left):
    """What keys, and values, (G * D) of a layer are multiplied with, if `left` of its `groups` are left."""
    queries, keys, values = (
        inputs @ rows_of(part).T for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    size, count, outputs = keys.shape[1] // groups, groups // left, attention.o_proj.weight.detach().double()
    half, wide = size // 2, values.shape[1] // groups
    of_keys, of_values = (
        torch.zeros(keys.shape[1], keys.shape[1]).double(),
        torch.zeros(values.shape[1], values.shape[1]),
    )
    of_values = of_values.double()
    asked = queries.unflatten(1, (groups, -1, size))
    for first in range(0, groups, count):
        block = range(first, first + count)
        for pair in range(half):
            places = [(group * size + pair, group * size + half + pair) for group in block]
            power = [asked[:, group, :, [pair, half + pair]].square().sum().sqrt() for group in block]
            # A pair as a complex number, one column for each KV group.
            wave = torch.stack([torch.complex(keys[:, one], keys[:, other]) for one, other in places], dim=1)
            scale = torch.stack(power)
            _, _, right = torch.linalg.svd(wave * scale, full_matrices=False)
            kept = right[0].conj()[:, None] * right[0][None]  # what multiplies a row from the right
            kept = scale[:, None] * kept / scale[None]
            for at, source in enumerate(places):
                for to, target in enumerate(places):
                    number = kept[at, to]
                    block_of = torch.tensor([[number.real, -number.imag], [number.imag, number.real]])
                    for row in range(2):
                        for column in range(2):
                            of_keys[target[row], source[column]] = block_of[row, column]
        mine = slice(first * wide, (first + count) * wide)
        heads = outputs.unflatten(1, (groups, -1, wide))
        # What single values would put out, each by the heads of its KV group.
        reads = torch.zeros(heads.shape[2] * count * len(outputs), count * wide).double()
        for number, group in enumerate(block):
            for head in range(heads.shape[2]):
                start = (number * heads.shape[2] + head) * len(outputs)
                reads[start : start + len(outputs), number * wide : (number + 1) * wide] = heads[:, group, head]
        made = reads @ values[:, mine].T
        left_side = torch.linalg.svd(made, full_matrices=False)[0][:, :wide]
        of_values[mine, mine] = torch.linalg.pinv(reads) @ left_side @ left_side.T @ reads
    return of_keys.float(), of_values.float()


@contextmanager
def merged_base(base, family, folder, layers):
    """While open, `base` has keys and values as if these layers had so many KV groups: {layer: number}."""
    handles, inputs = [], inputs_of(folder, layers)
    for layer, left in layers.items():
        attention = list(attentions_of(base, FAMILIES[family]))[layer]
        groups = attention.k_proj.weight.shape[0] // attention.head_dim
        made = projections(attention, inputs[layer], groups, left)
        for part, matrix in zip((attention.k_proj, attention.v_proj), made, strict=True):
            handles.append(part.register_forward_hook(lambda _, args, output, by=matrix: output @ by.T))
    try:
        yield base
    finally:
        for handle in handles:
            handle.remove()
