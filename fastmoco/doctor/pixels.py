"""Augmentation as the pipelines do it on this device, against torchvision: colour, and crop with antialiased resize.

N images · V views · S side of a crop
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from fastmoco.doctor.compare import Errors, verdict
from fastmoco.doctor.findings import Finding, Status, Target
from fastmoco.doctor.kernels import implementation
from fastmoco.doctor.units import seconds_per_call
from pipelines.augment import c_ops, torch_ops
from pipelines.augment.params import Column, Op, blur_taps, sample_params
from pipelines.augment.presets import V2
from pipelines.augment.resample import crop_resize
from pipelines.data.resident_pixels import ResidentPixels

ADVICE = "its views are wrong: train with --pipeline dataloader, and report this with fastmoco doctor --json"
COMPILER_BRINGS = "compiled, it takes a fifth of the time on a CPU: apt-get install gcc libc6-dev"
_VIEWS = {"cuda": 512, "cpu": 32}
_SIDE = {"cuda": 224, "cpu": 64}
_CHECKED = 12  # views that torchvision computes too, one by one
_COLOUR_ERROR = 1e-4  # of normalised values, which range over ±2.6
_CROP_ERROR = 1.01  # levels of 255: both round
_JITTER = {
    Op.BRIGHTNESS: TF.adjust_brightness,
    Op.CONTRAST: TF.adjust_contrast,
    Op.SATURATION: TF.adjust_saturation,
    Op.HUE: TF.adjust_hue,
}


def colour(target: Target) -> Finding:
    """Jitter, grey, blur, flip and normalisation, as in MoCo v2."""
    device = torch.device(target.device)
    kernels, reason = implementation(device), ""
    if device.type == "cpu":
        library, reason = c_ops.loop()
        kernels = "torch" if library is None else "C"
    finding = colour_kernel(kernels, device, _VIEWS[device.type], _SIDE[device.type])
    if reason and finding.status == Status.OK:
        return replace(finding, text=f"{finding.text}; it is not compiled: {reason}", advice=COMPILER_BRINGS)
    return finding


def colour_kernel(kernels: str, device: torch.device, views: int, side: int) -> Finding:
    """`views` crops of `side` pixels."""
    crops, params = _pictures(views, side), sample_params(0, 0, np.arange(views), V2)[0]
    on_device, rows = crops.to(device), torch.from_numpy(params).to(device)

    def by_torch() -> Tensor:
        return torch_ops.apply(on_device, params, V2, torch.float32)

    def by_triton() -> Tensor:
        from pipelines.augment import triton_ops  # Triton comes with torch's CUDA builds only

        return triton_ops.apply(on_device, rows, V2, torch.float32)

    def by_c() -> Tensor:
        return c_ops.apply(on_device, params, V2, torch.float32)

    ours = {"triton": by_triton, "C": by_c}.get(kernels, by_torch)
    expected = torch.stack([_by_torchvision(crops[i], params[i]) for i in range(min(views, _CHECKED))])
    error = (ours()[: len(expected)].cpu() - expected).abs().max().item()
    return verdict(
        kernels,
        Errors("views", error, _COLOUR_ERROR),
        seconds=seconds_per_call(ours, str(device)),
        plain_seconds=None if ours is by_torch else seconds_per_call(by_torch, str(device)),
        moved_bytes=views * 3 * side**2 * (1 + 4),  # uint8 in, float32 out
        advice=ADVICE,
    )


def _by_torchvision(crop: Tensor, row: np.ndarray) -> Tensor:
    """One (S, S, 3) uint8 crop through torchvision's functionals: (3, S, S) float32, normalised."""
    image = crop.permute(2, 0, 1).float() / 255
    order = int(row[Column.ORDER])
    for position in range(4):
        op = Op((order >> 2 * position) & 3)
        image = _JITTER[op](image, float(row[Column.BRIGHTNESS + op]))
    if row[Column.GREY]:
        image = TF.rgb_to_grayscale(image, 3)
    if sigma := float(row[Column.BLUR_SIGMA]):
        taps = blur_taps(V2, image.shape[-1])
        image = TF.gaussian_blur(image, [taps, taps], [sigma, sigma])
    if row[Column.FLIP]:
        image = TF.horizontal_flip(image)
    return TF.normalize(image, list(V2.mean), list(V2.std))


def crop(target: Target) -> Finding:
    """Crops of a resident data set of small images, enlarged and reduced."""
    device = torch.device(target.device)
    return crop_kernel(implementation(device), device, 8 * _VIEWS[device.type], 32)


def crop_kernel(kernels: str, device: torch.device, images: int, side: int) -> Finding:
    """One crop of `side` pixels of each of `images` of twice that side."""
    size = 2 * side
    pictures = _pictures(images, size).permute(0, 1, 3, 2).contiguous()  # rows of three planes
    pixels = pictures.to(device)
    generator = torch.Generator().manual_seed(0)
    extent = torch.randint(side // 2, size + 1, (images, 2), generator=generator)
    corner = (torch.rand(images, 2, generator=generator) * (size - extent + 1)).long()
    boxes = torch.cat([corner, extent], dim=1).int()
    on_device = boxes.to(device)
    resident = _resident(pixels)
    source = torch.arange(images, device=device)

    def by_torch() -> Tensor:
        out = torch.empty((1, images, side, 3, side), dtype=torch.uint8, device=device)
        crop_resize(pixels, on_device[None], out)
        return out[0].permute(0, 1, 3, 2)

    def by_triton() -> Tensor:
        from pipelines.augment.resample_triton import crop

        return crop(resident, on_device, side, source)

    ours = by_triton if kernels == "triton" else by_torch
    checked = range(min(images, _CHECKED))
    expected = torch.stack([_by_interpolate(pictures[i], boxes[i].tolist(), side) for i in checked])
    error = (ours()[: len(expected)].cpu().float() - expected).abs().max().item()
    return verdict(
        kernels,
        Errors("crops, of 255 levels", error, _CROP_ERROR),
        seconds=seconds_per_call(ours, str(device)),
        plain_seconds=None if ours is by_torch else seconds_per_call(by_torch, str(device)),
        moved_bytes=3 * int(extent.prod(dim=1).sum()) + images * 3 * side**2,
        advice=ADVICE,
    )


def _by_interpolate(pixels: Tensor, box: list[int], side: int) -> Tensor:
    """(H, 3, W) uint8 and top, left, height, width: (S, S, 3) float32, not rounded."""
    top, left, height, width = box
    region = pixels[top : top + height, :, left : left + width].permute(1, 0, 2)[None].float()
    return F.interpolate(region, (side, side), mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def _resident(pixels: Tensor) -> ResidentPixels:
    """(N, H, 3, W) uint8 as the data set of a run."""
    count, height, _, width = pixels.shape
    offsets = torch.arange(count, device=pixels.device) * (3 * height * width)
    sizes = torch.tensor([[height, width]], dtype=torch.int32, device=pixels.device).repeat(count, 1)
    return ResidentPixels(pixels, offsets, sizes, planar=True)


def _pictures(count: int, side: int) -> Tensor:
    """(N, S, S, 3) uint8: a gradient in a colour of its own, with noise, white and black corners."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, side)
    tints = torch.rand(2, count, 1, 1, 3, generator=generator)
    smooth = ramp[:, None, None] * tints[0] + ramp[None, :, None] * tints[1]
    noise = torch.randint(36, (count, side, side, 3), generator=generator)
    images = (110 * smooth + noise).to(torch.uint8)
    images[:, : side // 4, : side // 4] = 255
    images[:, side // 2 :, -1:] = 0
    return images
