"""All parameters of a module in one buffer, so that one kernel updates them all.

P floats of parameters with padding · Q floats of batch norm statistics · N counters with padding
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

_ALIGN = 32  # elements, 128 bytes in float32: tensors start aligned, so that kernels can use vectorised loads
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True, slots=True)
class Slot:
    """Location of a named tensor in a flat buffer, in elements; a 4-d tensor is stored in channels-last order."""

    name: str
    shape: torch.Size
    offset: int

    def view(self, flat: Tensor) -> Tensor:
        """The tensor as a view of `flat`."""
        values = flat[self.offset : self.offset + self.shape.numel()]
        if len(self.shape) != 4:
            return values.view(self.shape)
        outputs, inputs, height, width = self.shape
        return values.view(outputs, height, width, inputs).permute(0, 3, 1, 2)


class FlatParameters:
    """Moves the parameters, gradients and buffers of a module into flat buffers.

    values   (P,) the parameters; those with weight decay come first, in `values[:num_decayed]`
    grads    (P,) their gradients, or None for a frozen module; zeroed in one operation
    buffers  (Q,) the floating-point buffers: running means and variances
    counters (N,) the int64 buffers: batches tracked by batch norm, so that a checkpoint copies them at once

    Every parameter, gradient and buffer of the module becomes a view of these, so its state_dict keeps its names,
    values and shapes, and load_state_dict copies into the flat buffers. Padding between tensors is and stays zero.
    Modules of the same architecture have the same layout.

    With `decay_norm_and_bias` False, the parameters of normalisation layers and all biases are excluded from weight
    decay; MoCo decays everything.

    The module must be on its device, of one floating type (float32; float64 in tests), its parameters all trainable or
    all frozen. Copy or move it before; `.to(device)` and `zero_grad()` detach the views, which `is_intact` checks.
    """

    def __init__(self, module: nn.Module, *, decay_norm_and_bias: bool = True) -> None:
        named = dict(module.named_parameters())
        skip = set() if decay_norm_and_bias else set(_norms_and_biases(module))
        decayed = {name: p for name, p in named.items() if name not in skip}
        rest = {name: p for name, p in named.items() if name in skip}
        statistics = {name: b for name, b in module.named_buffers() if b.is_floating_point()}
        counts = {name: b for name, b in module.named_buffers() if b.dtype == torch.int64}
        types = {tensor.dtype for tensor in (*named.values(), *statistics.values())}
        assert len(types) == 1, f"parameters and buffers must have one type, not {types}"
        trained = {p.requires_grad for p in named.values()}
        assert len(trained) == 1, "parameters must be all trained or all frozen"

        slots, self.num_decayed = _lay_out(decayed, 0)
        more_slots, size = _lay_out(rest, self.num_decayed)
        self.slots = (*slots, *more_slots)
        self.buffer_slots, buffer_size = _lay_out(statistics, 0)
        self.counter_slots, counter_size = _lay_out(counts, 0)

        like = next(iter(named.values())).detach()
        self.values = like.new_zeros(size)
        self.grads = like.new_zeros(size) if trained.pop() else None
        self.buffers = like.new_zeros(buffer_size)
        self.counters = like.new_zeros(counter_size, dtype=torch.int64)
        for slot in self.slots:
            parameter = named[slot.name]
            parameter.data = slot.view(self.values).copy_(parameter.data)
            parameter.grad = None if self.grads is None else slot.view(self.grads)
        for slots, flat, buffers in (
            (self.buffer_slots, self.buffers, statistics),
            (self.counter_slots, self.counters, counts),
        ):
            for slot in slots:
                buffer = buffers[slot.name]
                buffer.data = slot.view(flat).copy_(buffer.data)
        self._module = module

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a (P,) buffer in this layout by parameter name, as in a checkpoint."""
        assert flat.shape == self.values.shape, (flat.shape, self.values.shape)
        return {slot.name: slot.view(flat) for slot in self.slots}

    def move_buffers(self, buffers: Tensor) -> None:
        """Keep the floating-point buffers in (Q,) memory that has their values already."""
        assert buffers.shape == self.buffers.shape, (buffers.shape, self.buffers.shape)
        self.buffers = buffers
        for slot in self.buffer_slots:
            self._module.get_buffer(slot.name).data = slot.view(buffers)

    def is_intact(self) -> bool:
        """Whether all parameters, gradients and buffers of the module are still views of the flat buffers."""
        pairs: list[tuple[Tensor | None, Tensor]] = []
        for slot in self.slots:
            parameter = self._module.get_parameter(slot.name)
            pairs.append((parameter, slot.view(self.values)))
            if self.grads is not None:
                pairs.append((parameter.grad, slot.view(self.grads)))
        for slots, flat in ((self.buffer_slots, self.buffers), (self.counter_slots, self.counters)):
            pairs += [(self._module.get_buffer(slot.name), slot.view(flat)) for slot in slots]
        return all(tensor is not None and tensor.data_ptr() == view.data_ptr() for tensor, view in pairs)


def join_buffers(*modules: FlatParameters) -> Tensor:
    """Move the floating-point buffers of several modules into one, (ΣQ,), so that one operation reads them all."""
    joined = torch.cat([flat.buffers for flat in modules])
    for flat, part in zip(modules, joined.split([len(flat.buffers) for flat in modules]), strict=True):
        flat.move_buffers(part)
    return joined


def _lay_out(tensors: dict[str, Tensor] | dict[str, nn.Parameter], offset: int) -> tuple[tuple[Slot, ...], int]:
    """Slots of the tensors, in their order, from `offset` on; and the aligned end."""
    slots = []
    for name, tensor in tensors.items():
        slots.append(Slot(name, tensor.shape, offset))
        offset += -(-tensor.numel() // _ALIGN) * _ALIGN
    return tuple(slots), offset


def _norms_and_biases(module: nn.Module) -> Iterator[str]:
    """Names of the parameters of normalisation layers, and of the biases of all layers."""
    for prefix, layer in module.named_modules():
        for name, _ in layer.named_parameters(recurse=False):
            if isinstance(layer, _NORMS) or name == "bias":
                yield f"{prefix}.{name}" if prefix else name
