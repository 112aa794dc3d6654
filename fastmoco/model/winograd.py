"""3×3 convolutions on a CPU by Winograd's algorithm F(4×4, 3×3): a quarter of the multiplications.

N images · C, O channels in and out · H, W sides · T tiles of 4×4 outputs, each of 6×6 inputs
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.3, at the points 0, ±1, ±2 and ∞:
# a tile y of the convolution of d by g is A [(G g Gᵀ) ⊙ (B d Bᵀ)] Aᵀ (theirs has transposes at A and B).
_A = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
_B = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_G = ((6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 24))  # / 24

# The smallest channel counts and numbers of tiles at which it is faster than oneDNN's direct convolutions for AVX2.
MIN_CHANNELS, MIN_TILES = 256, 64
MIN_CHANNELS_OF_WEIGHT_GRADIENT, MIN_TILES_OF_WEIGHT_GRADIENT = 128, 32
_CHUNK = 2**16  # values per point of a tile at a time, so that the 36 products find them in the cache


def winograd_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """`F.conv2d(x, weight, padding=1)`, differentiable once.

    x (N, C, H, W), weight (O, C, 3, 3), both float32 or float64, on a CPU → (N, O, H, W), channels-last.

    With U, D and P the 6×6 transforms of filters, inputs and gradients of outputs, each of the 36 points (T, ·) is a
    matrix product: forward D Uᵀ, input gradient the same with flipped filters, weight gradient Pᵀ D. In float32 the
    relative error is 3e-6, that of the direct convolution 1e-6.

    Below MIN_CHANNELS the transforms take about as long as what they save, except of the weight gradient, for which
    oneDNN's kernel for AVX2 runs at half the rate of the forward. One core of an EPYC (Zen 3), 256 images, CPU ms:

    | | forward, direct | Winograd | weight gradient, direct | Winograd |
    |---|---|---|---|---|
    | 512 channels at 4×4 | 254 | 119 | 548 | 98 |
    | 256 channels at 8×8 | 198 | 123 | 409 | 132 |
    | 128 channels at 16×16 | 261 | 236 | 443 | 261 |
    """
    return _WinogradConv2d.apply(x, weight)


def winograd_is_used(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether any convolution of training in this dtype uses it: in float32 on a processor whose best is AVX2.

    It is measured there only: with AVX-512 oneDNN has other kernels, and in 16 bits it uses other instructions.
    """
    return device.type == "cpu" and dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX2"


def winograd_is_faster(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether `winograd_conv2d` computes this convolution of x in training, and faster than torch."""
    return (
        not torch.compiler.is_compiling()  # the compiler would take the transforms apart
        and conv.training
        and x.dtype == conv.weight.dtype
        and winograd_is_used(x.device, x.dtype)
        and not torch.is_autocast_enabled("cpu")
        and min(conv.weight.shape[:2]) >= MIN_CHANNELS_OF_WEIGHT_GRADIENT
        and _number_of_tiles(x) >= MIN_TILES_OF_WEIGHT_GRADIENT
    )


class WinogradConv2d(nn.Conv2d):
    """A 3×3 convolution of stride 1 that uses Winograd's algorithm where that is faster: see `use_winograd`."""

    def forward(self, input: Tensor) -> Tensor:
        return winograd_conv2d(input, self.weight) if winograd_is_faster(self, input) else super().forward(input)


def use_winograd(model: nn.Module, use: bool = True) -> None:
    """Make a `WinogradConv2d` of every convolution that can be one, or undo it. Parameters stay the same."""
    before, after = (nn.Conv2d, WinogradConv2d) if use else (WinogradConv2d, nn.Conv2d)
    for module in model.modules():
        if type(module) is before and _is_possible(module):
            object.__setattr__(module, "__class__", after)


def _is_possible(conv: nn.Conv2d) -> bool:
    sizes = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return sizes == ((3, 3), (1, 1), (1, 1), (1, 1)) and conv.groups == 1 and conv.bias is None


class _WinogradConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.direct = min(weight.shape[:2]) < MIN_CHANNELS or _number_of_tiles(x) < MIN_TILES
        if ctx.direct:
            return F.conv2d(x, weight, padding=1)
        return _convolved(x, _filters(weight.permute(2, 3, 0, 1)).transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0] and ctx.direct:
            one, zero = [1, 1], [0, 0]
            options = (one, one, one, False, zero, 1, [True, False, False])  # stride, padding, dilation; that gradient
            grad_x = torch.ops.aten.convolution_backward(grad, x, weight, None, *options)[0]
        elif ctx.needs_input_grad[0]:
            grad_x = _convolved(grad, _filters(weight.permute(2, 3, 0, 1).flip(0, 1)))
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(x, grad)
        return grad_x, grad_weight


def _convolved(x: Tensor, filters: Tensor) -> Tensor:
    """Convolution by transformed filters (36, C, O) → (N, O, H, W), channels-last."""
    height, width, channels = x.shape[2], x.shape[3], filters.shape[2]
    rows, columns = _tiles(height), _tiles(width)
    y = x.new_empty(len(x), rows, 4, columns, 4, channels)
    inverse = _kron(_A, x)
    for part_x, part_y in _chunks(x, y):
        products = torch.bmm(_inputs(part_x), filters)
        tiles = (inverse @ products.view(36, -1)).view(4, 4, len(part_x), rows, columns, channels)
        part_y.copy_(tiles.permute(2, 3, 0, 4, 1, 5))
    y = y.view(len(x), 4 * rows, 4 * columns, channels)[:, :height, :width]
    return y.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """(O, C, 3, 3), channels-last: the adjoint of the forward with respect to the filters."""
    out, channels = grad.shape[1], x.shape[1]
    sums = x.new_empty(36, out, channels)
    for i, (part_x, part_grad) in enumerate(_chunks(x, grad)):
        outputs = _outputs(part_grad).transpose(1, 2)
        torch.baddbmm(sums, outputs, _inputs(part_x), beta=min(i, 1), out=sums)
    taps = (_kron(_G, x).T @ sums.view(36, -1)).view(9, out, channels) / 24**2
    return taps.transpose(0, 1).reshape(out, 3, 3, channels).permute(0, 3, 1, 2)


def _filters(taps: Tensor) -> Tensor:
    """Transforms of filters (3, 3, O, C) → (36, O, C)."""
    return (_kron(_G, taps) / 24**2 @ taps.reshape(9, -1)).view(36, *taps.shape[2:])


def _inputs(x: Tensor) -> Tensor:
    """Transforms of the overlapping tiles of x (N, C, H, W), padded by one → (36, T, C)."""
    n, channels, height, width = x.shape
    rows, columns = _tiles(height), _tiles(width)
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 4 * columns + 1 - width, 1, 4 * rows + 1 - height)).contiguous()
    image, row, column, _ = x.stride()
    tiles = x.as_strided((6, 6, n, rows, columns, channels), (row, column, image, 4 * row, 4 * column, 1))
    return (_kron(_B, x) @ tiles.reshape(36, -1)).view(36, -1, channels)


def _outputs(grad: Tensor) -> Tensor:
    """Adjoint transforms of the tiles of a gradient (N, O, H, W) → (36, T, O)."""
    n, channels, height, width = grad.shape
    rows, columns = _tiles(height), _tiles(width)
    grad = F.pad(grad.permute(0, 2, 3, 1), (0, 0, 0, 4 * columns - width, 0, 4 * rows - height))
    tiles = grad.reshape(n, rows, 4, columns, 4, channels).permute(2, 4, 0, 1, 3, 5)
    return (_kron(_A, grad).T @ tiles.reshape(16, -1)).view(36, -1, channels)


def _number_of_tiles(x: Tensor) -> int:
    return len(x) * _tiles(x.shape[2]) * _tiles(x.shape[3])


def _tiles(side: int) -> int:
    return -(-side // 4)


def _chunks(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of some consecutive images each."""
    values = x.shape[1] * _tiles(x.shape[2]) * _tiles(x.shape[3])
    images = max(1, _CHUNK // values)
    return zip(x.split(images), y.split(images), strict=True)


def _kron(matrix: tuple[tuple[int, ...], ...], like: Tensor) -> Tensor:
    """The transform of both dimensions of a tile at once, for tiles as columns."""
    one = like.new_tensor(matrix)
    return torch.kron(one, one)
