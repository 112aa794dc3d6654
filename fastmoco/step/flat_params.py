"""All parameters of a module in one buffer, so that one kernel updates them all, and their gradients in another.

P floats of parameters with padding · Q floats of batch norm statistics · N counters with padding
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

_ALIGN = 32  # elements, 128 bytes in float32: tensors start aligned, so that kernels can use vectorised loads
_ROUNDED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
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
    """Moves the parameters and buffers of a module into flat buffers, and its gradients by `collect_gradients`.

    values   (P,) the parameters; those with weight decay come first, in `values[:num_decayed]`
    grads    (P,) their gradients, or None for a frozen module
    rounded  (P,) the parameters in the 16-bit type of autocast, or None: see `keep_rounded`
    buffers  (Q,) the floating-point buffers: running means and variances
    counters (N,) the int64 buffers: batches tracked by batch norm, so that a checkpoint copies them at once

    Every parameter and buffer of the module becomes a view of these, so its state_dict keeps its names, values and
    shapes, and load_state_dict copies into the flat buffers. Padding between tensors is and stays zero. Modules of the
    same architecture have the same layout.

    With `decay_norm_and_bias` False, the parameters of normalisation layers and all biases are excluded from weight
    decay; MoCo decays everything.

    The module must be on its device, of one floating type (float32; float64 in tests), its parameters all trainable or
    all frozen. Copy or move it before; `.to(device)` detaches the views, which `is_intact` checks.
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
            parameter.grad = None
        for slots, flat, buffers in (
            (self.buffer_slots, self.buffers, statistics),
            (self.counter_slots, self.counters, counts),
        ):
            for slot in slots:
                buffer = buffers[slot.name]
                buffer.data = _own(slot.view(flat).copy_(buffer.data))
        self._module = module
        self.rounded: Tensor | None = None
        self.leaves: dict[str, Tensor] = {**named}
        self._parameters = list(named.values())
        self._gradients = {} if self.grads is None else self.named(self.grads)
        self._rounded_at = 0

    def keep_rounded(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Keep the parameters in the 16-bit type of autocast too, and return what a forward needs of them by name.

        These are the weights and biases that autocast would round in every forward, of convolutions and linear layers:
        leaves that are views of `rounded`, for `torch.func.functional_call`. Their gradients are those of the
        parameters, unchanged by the rounding. Whoever changes `values` also has to change `rounded`: see `round`.
        """
        self.rounded = torch.empty_like(self.values, dtype=dtype)
        self.round()
        names = set(_rounded_by_autocast(self._module))
        for slot in self.slots:
            if slot.name in names:
                self.leaves[slot.name] = slot.view(self.rounded).requires_grad_(self.grads is not None)
        return {name: self.leaves[name] for name in names}

    @torch.no_grad()
    def round(self) -> None:
        """Bring `rounded`, if it is kept, up to date with `values`."""
        if self.rounded is not None:
            self.rounded.copy_(self.values)
            self._rounded_at = self._version()

    def round_if_changed(self) -> None:
        """`round` if torch has changed a parameter in place since; changes by collectives or Triton do not show."""
        if self.rounded is not None and self._version() != self._rounded_at:
            self.round()

    def _version(self) -> int:
        """A number that grows with every change in place, since values are not compared."""
        return self.values._version + sum(parameter._version for parameter in self._parameters)

    def collect_gradients(self, names: Iterable[str] | None = None) -> None:
        """Move the gradients of the named parameters (all) into `grads`, in few launches, and set those to None.

        Autograd keeps the gradient that it computed if there is none to add to, which saves a pass over each. One that
        it did not compute is 0.
        """
        assert self.grads is not None
        by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}  # views of `grads`, and what goes there
        for name in self.leaves if names is None else names:
            leaf, view = self.leaves[name], self._gradients[name]
            if leaf.grad is None:
                view.zero_()
                continue
            views, computed = by_type.setdefault(leaf.grad.dtype, ([], []))
            views.append(view)
            computed.append(leaf.grad)
            leaf.grad = None
        with torch.no_grad():
            for views, computed in by_type.values():
                torch._foreach_copy_(views, computed)

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a (P,) buffer in this layout by parameter name, as in a checkpoint."""
        assert flat.shape == self.values.shape, (flat.shape, self.values.shape)
        return {slot.name: slot.view(flat) for slot in self.slots}

    def move_buffers(self, buffers: Tensor) -> None:
        """Keep the floating-point buffers in (Q,) memory that has their values already."""
        assert buffers.shape == self.buffers.shape, (buffers.shape, self.buffers.shape)
        self.buffers = buffers
        for slot in self.buffer_slots:
            self._module.get_buffer(slot.name).data = _own(slot.view(buffers))

    def named_buffers(self) -> dict[str, Tensor]:
        """Views of the flat buffers by name, so that whoever copies all of them copies few storages."""
        parts = ((self.buffer_slots, self.buffers), (self.counter_slots, self.counters))
        return {slot.name: slot.view(flat) for slots, flat in parts for slot in slots}

    def is_intact(self) -> bool:
        """Whether all parameters and buffers of the module are still views of the flat buffers."""
        pairs = [(self._module.get_parameter(slot.name), slot.view(self.values)) for slot in self.slots]
        for slots, flat in ((self.buffer_slots, self.buffers), (self.counter_slots, self.counters)):
            pairs += [(self._module.get_buffer(slot.name), slot.view(flat)) for slot in slots]
        return all(tensor.data_ptr() == view.data_ptr() for tensor, view in pairs)


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


def _rounded_by_autocast(module: nn.Module) -> Iterator[str]:
    """Names of the parameters of convolutions and linear layers, except those that compute with them first.

    Such as convolutions that standardise their weights (timm's ScaledStdConv2d), for which autocast rounds the result.
    """
    for prefix, layer in module.named_modules():
        if isinstance(layer, _ROUNDED) and type(layer).__module__.partition(".")[0] in ("torch", "fastmoco"):
            for name, _ in layer.named_parameters(recurse=False):
                yield f"{prefix}.{name}" if prefix else name


def _own(view: Tensor) -> Tensor:
    """The same memory as a tensor that torch does not know to be a view.

    Inductor copies all but one of the tensors that an operator changes if they are views of one buffer, as the running
    mean and variance of a layer are.
    """
    return view if view.is_meta else torch.from_dlpack(view)


def _norms_and_biases(module: nn.Module) -> Iterator[str]:
    """Names of the parameters of normalisation layers, and of the biases of all layers."""
    for prefix, layer in module.named_modules():
        for name, _ in layer.named_parameters(recurse=False):
            if isinstance(layer, _NORMS) or name == "bias":
                yield f"{prefix}.{name}" if prefix else name
