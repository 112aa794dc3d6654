"""Winograd's algorithm against torch's direct convolution, forward and backward, and where it is used."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.model import winograd
from fastmoco.model.encoder import Encoder, build_encoder
from fastmoco.model.winograd import WinogradConv2d, use_winograd, winograd_conv2d, winograd_is_faster

SIZES = [(3, 5, 7, 4, 4), (2, 3, 2, 7, 9), (1, 4, 4, 1, 5), (5, 2, 3, 8, 8), (2, 6, 5, 2, 3), (1, 1, 1, 13, 4)]


@pytest.fixture(params=[True, False], ids=["all-winograd", "weight-gradient-only"])
def algorithm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 0 if request.param else 10**9)
    monkeypatch.setattr(winograd, "MIN_TILES", 0)


def direct(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1)


def results(convolve: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, input gradient and weight gradient."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = convolve(x, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]


def example(n: int, c: int, o: int, h: int, w: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + c + h)
    shapes = ((n, c, h, w), (o, c, 3, 3), (n, o, h, w))
    x, weight, grad = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return x, weight, grad


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("size", SIZES)
def test_in_float64_it_is_the_direct_convolution(
    size: tuple[int, int, int, int, int], layout: torch.memory_format, algorithm: None
) -> None:
    tensors = [tensor.contiguous(memory_format=layout) for tensor in example(*size, torch.float64)]
    for ours, torchs in zip(results(winograd_conv2d, *tensors), results(direct, *tensors), strict=True):
        assert ours.shape == torchs.shape
        assert error(ours, torchs) < 1e-13


@pytest.mark.parametrize("size", [(8, 128, 64, 8, 8), (9, 32, 160, 5, 7)])
def test_in_float32_it_is_at_most_ten_times_as_inexact_as_the_direct_convolution(
    size: tuple[int, int, int, int, int], algorithm: None
) -> None:
    exact = results(direct, *example(*size, torch.float64))
    tensors = [tensor.float() for tensor in example(*size, torch.float64)]
    for ours, torchs, expected in zip(
        results(winograd_conv2d, *tensors), results(direct, *tensors), exact, strict=True
    ):
        assert ours.dtype == torch.float32
        assert error(ours, expected) < max(10 * error(torchs, expected), 3e-6)


def test_images_may_be_computed_in_any_number_of_parts(algorithm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = example(7, 3, 4, 6, 6, torch.float64)
    whole = results(winograd_conv2d, *tensors)
    for values in (1, 2 * 4 * 3, 3 * 4 * 3):  # one, two and three images at a time
        monkeypatch.setattr(winograd, "_CHUNK", values)
        for part, expected in zip(results(winograd_conv2d, *tensors), whole, strict=True):
            torch.testing.assert_close(part, expected)


def test_output_and_gradients_have_the_layout_of_channels_last_training(algorithm: None) -> None:
    x, weight, _ = (tensor.to(memory_format=torch.channels_last) for tensor in example(4, 8, 6, 8, 5, torch.float32))
    x.requires_grad_()
    weight.requires_grad_()
    y = winograd_conv2d(x, weight)
    y.sum().backward()  # an expanded gradient, without memory of its own
    for tensor in (y, x.grad, weight.grad):
        assert tensor is not None
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_only_the_gradients_that_are_needed_are_computed(algorithm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, grad = example(2, 3, 4, 8, 8, torch.float64)
    expected = results(direct, x, weight, grad)
    (grad_weight,) = torch.autograd.grad(winograd_conv2d(x, weight.requires_grad_()), weight, grad)
    torch.testing.assert_close(grad_weight, expected[2])
    monkeypatch.setattr(winograd, "_weight_gradient", None)
    weight, x = weight.detach(), x.requires_grad_()
    (grad_x,) = torch.autograd.grad(winograd_conv2d(x, weight), x, grad)
    torch.testing.assert_close(grad_x, expected[1])


# ---- where it is used ------------------------------------------------------------------------------------------------


@pytest.fixture
def on_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


def convolution(channels: int = 128) -> WinogradConv2d:
    return WinogradConv2d(channels, channels, 3, padding=1, bias=False)


def test_it_is_used_in_float32_training_of_wide_layers_on_avx2(on_avx2: None) -> None:
    conv, x = convolution(), torch.zeros(2, 128, 16, 16)
    assert winograd_is_faster(conv, x)
    assert not winograd_is_faster(conv, x[:1])  # 16 tiles
    assert not winograd_is_faster(conv, x.double())
    assert not winograd_is_faster(conv, x.to("meta"))
    assert not winograd_is_faster(convolution(64), x[:, :64])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not winograd_is_faster(conv, x)
    assert not winograd_is_faster(conv.eval(), x)  # also when it is exported


def test_a_compiler_sees_one_convolution(on_avx2: None) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    conv, x = convolution(), torch.randn(2, 128, 16, 16)
    torch.compile(conv, backend=backend, fullgraph=True)(x)
    torch._dynamo.reset()
    assert "conv2d" in graphs[0].code
    assert len([node for node in graphs[0].graph.nodes if node.op.startswith("call")]) == 1


@pytest.mark.parametrize("capability", ["AVX512", "DEFAULT", "NO AVX"])
def test_it_is_not_used_where_it_was_not_measured(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert not winograd_is_faster(convolution(), torch.zeros(2, 128, 16, 16))


def test_few_tiles_are_convolved_directly_but_for_the_weight_gradient(
    on_avx2: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("_convolved", "_weight_gradient"):
        function = getattr(winograd, name)
        monkeypatch.setattr(winograd, name, lambda *a, f=function, name=name: (calls.append(name), f(*a))[1])
    conv = convolution(256)
    for images, expected in (
        (7, []),
        (8, ["_weight_gradient"]),
        (16, ["_convolved", "_convolved", "_weight_gradient"]),
    ):
        calls.clear()
        conv(torch.randn(images, 256, 8, 8, requires_grad=True)).sum().backward()
        assert calls == expected


@pytest.mark.parametrize(("arch", "count"), [("resnet18", 13), ("resnet50", 13), ("resnext50_32x4d", 0)])
def test_convolutions_of_stride_one_without_groups_can_use_it(arch: str, count: int) -> None:
    model = build_encoder(arch, width=0.25, dim=8)
    names = [name for name, module in model.named_modules() if isinstance(module, WinogradConv2d)]
    assert len(names) == count
    assert all(name.split(".")[-1] in ("conv1", "conv2") for name in names)
    use_winograd(model, False)
    assert not any(isinstance(module, WinogradConv2d) for module in model.modules())
    nothing = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False))
    use_winograd(nothing)
    assert not any(isinstance(module, WinogradConv2d) for module in nothing)


def test_an_encoder_trains_as_with_direct_convolutions(algorithm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = build_encoder("resnet18", stem="cifar", width=0.125, dim=8, bn_splits=2).double().train()
    twin, x = copy.deepcopy(model), torch.randn(8, 3, 12, 12, dtype=torch.float64)

    def gradients(model: Encoder) -> list[Tensor]:
        model(x).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = gradients(twin)
    monkeypatch.setattr(winograd, "winograd_is_faster", lambda conv, x: True)
    assert model.state_dict().keys() == twin.state_dict().keys()
    for actual, exact in zip(gradients(model), expected, strict=True):
        assert error(actual, exact) < 1e-9
