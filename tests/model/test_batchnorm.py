"""Split batch norm is plain batch norm of each group, in values, gradients and running statistics."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.errors import ConfigError
from fastmoco.model.batchnorm.split import SplitBatchNorm2d


def trained_layer(channels: int, splits: int, dtype: torch.dtype = torch.float64) -> SplitBatchNorm2d:
    generator = torch.Generator().manual_seed(0)
    layer = SplitBatchNorm2d(channels, splits).to(dtype)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            assert tensor is not None
            tensor.copy_(torch.rand(channels, generator=generator) + 0.5)
    return layer


def images(n: int, channels: int, side: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return (3 * x + 1).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("splits", [1, 2, 3, 6])
def test_each_group_is_normalised_alone(splits: int) -> None:
    layer, x = trained_layer(5, splits), images(6, 5, 4).requires_grad_()
    expected = torch.cat([F.batch_norm(g, None, None, layer.weight, layer.bias, True) for g in x.chunk(splits)])
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.is_contiguous(memory_format=torch.channels_last)

    upstream = images(6, 5, 4).flip(0)
    wanted = torch.autograd.grad(expected, (x, layer.weight, layer.bias), upstream)
    gradients = torch.autograd.grad(found, (x, layer.weight, layer.bias), upstream)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-10, atol=1e-10)
    assert gradients[0].is_contiguous(memory_format=torch.channels_last)


def test_gradients_are_those_of_finite_differences() -> None:
    layer = trained_layer(2, 2)

    def normalise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    parameters = (layer.weight.detach().clone().requires_grad_(), layer.bias.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(normalise, (images(4, 2, 2).requires_grad_(), *parameters))


def test_running_statistics_average_the_groups() -> None:
    # One channel, groups {0, 2} and {4, 10}: means 1 and 7, unbiased variances 2 and 18.
    layer = SplitBatchNorm2d(1, 2)
    layer(torch.tensor([0.0, 2.0, 4.0, 10.0]).view(4, 1, 1, 1))
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.running_mean.item() == pytest.approx(0.1 * 4.0)
    assert layer.running_var.item() == pytest.approx(0.9 + 0.1 * 10.0)


def test_evaluation_is_plain_batch_norm() -> None:
    layer = trained_layer(5, 4).eval()
    plain = nn.BatchNorm2d(5).double().eval()
    plain.load_state_dict(layer.state_dict())
    x = images(3, 5, 4)  # no multiple of 4
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_float32_statistics(dtype: torch.dtype) -> None:
    layer = trained_layer(8, 4, torch.float32)
    x = images(64, 8, 8, torch.float32).to(dtype) + 20  # a mean that sums in low precision would lose
    with torch.autocast("cpu", dtype=dtype):
        found = layer(x)
    assert found.dtype == dtype
    assert layer.running_mean is not None
    exact = trained_layer(8, 4)
    wanted = exact(x.double())
    torch.testing.assert_close(layer.running_mean.double(), exact.running_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.double(), wanted, rtol=0.02, atol=0.02)


def test_it_compiles_without_a_graph_break() -> None:
    eager, compiled = trained_layer(5, 3, torch.float32), trained_layer(5, 3, torch.float32)
    x = images(6, 5, 4, torch.float32)
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(x), eager(x))
    torch.testing.assert_close(compiled.running_var, eager.running_var)


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch of 6 .* 4 batch norm splits; .* multiple of 4"):
        SplitBatchNorm2d(5, 4)(images(6, 5, 4))
    with pytest.raises(ConfigError, match="1×1 pixels"):
        SplitBatchNorm2d(5, 4)(images(4, 5, 1))
    with pytest.raises(ConfigError, match="splits is 0"):
        SplitBatchNorm2d(5, 0)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_follows_is_the_same_in_one_function(
    splits: int, relu: bool, with_residual: bool, dtype: torch.dtype
) -> None:
    """The groups in the cache, one by one, against whole operations one after the other: the same bits."""
    parameters = torch.float32 if dtype == torch.bfloat16 else dtype
    layers = [trained_layer(6, splits, parameters) for _ in range(2)]
    inputs = [images(8, 6, 4, dtype).requires_grad_() for _ in range(2)]
    residuals = [images(8, 6, 4, dtype).flip(1).neg().requires_grad_() for _ in range(2)]
    upstream = images(8, 6, 4, dtype).flip(0)

    found = layers[0](inputs[0], relu, residuals[0] if with_residual else None)
    wanted = layers[1]._groups(inputs[1])
    wanted = wanted + residuals[1] if with_residual else wanted
    wanted = wanted.relu() if relu else wanted
    assert torch.equal(found, wanted)
    found.backward(upstream)
    wanted.backward(upstream)
    gradients = [(x.grad, residual.grad) for x, residual in zip(inputs, residuals, strict=True)]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert torch.equal(ours, theirs)
            assert ours.is_contiguous(memory_format=torch.channels_last)
    for ours, theirs in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)  # sums of the groups, in another order
    for ours, theirs in zip(layers[0].buffers(), layers[1].buffers(), strict=True):
        assert torch.equal(ours, theirs)
