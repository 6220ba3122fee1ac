"""Where the elements of a tensor lie: any order of dimensions, gaps, an offset, dimensions of stride 0."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Memory:
    """A memory layout for tensors of as many dimensions as `order` names."""

    order: tuple  # of dimensions, the one with the largest stride first
    step: tuple = (0, 1)  # (dimension, factor): its neighbours stand `factor` times as far apart as they need to
    offset: int = 0  # elements in front of the first
    expanded: int | None = None  # this dimension repeats its first slice, with stride 0


def allocate(shape, memory, dtype, device):
    """(flat, view): `view` has `shape` and `memory`'s strides and lies in `flat`, which is all NaN."""
    strides, size = [0] * len(shape), 1
    for dim in reversed(memory.order):
        if dim != memory.expanded:
            step = memory.step[1] if dim == memory.step[0] else 1
            strides[dim] = size * step
            size *= max(shape[dim], 1) * step
    flat = torch.full((memory.offset + size,), math.nan, dtype=dtype, device=device)
    return flat, flat.as_strided(shape, strides, memory.offset)


def place(x, memory):
    """x's values laid out by `memory`; what lies between them is NaN."""
    _, view = allocate(x.shape, memory, x.dtype, x.device)
    if memory.expanded is None:
        return view.copy_(x)
    if x.shape[memory.expanded]:
        view.narrow(memory.expanded, 0, 1).copy_(x.narrow(memory.expanded, 0, 1))
    return view


def gaps(flat, view):
    """The elements of `flat` that don't belong to `view`."""
    outside = torch.ones(flat.shape, dtype=torch.bool, device=flat.device)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return flat[outside]
