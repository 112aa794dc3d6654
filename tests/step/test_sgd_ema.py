"""The flat update against torch's own optimiser, and the flat buffers against the modules they serve."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fastmoco.model.batchnorm.split import SplitBatchNorm2d
from fastmoco.step.flat_params import FlatParameters
from fastmoco.step.sgd_ema import MomentumUpdate

LR, M, SGD_M, DECAY = 0.1, 0.99, 0.9, 0.05
YES, NO = torch.tensor(True), torch.tensor(False)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 6, 3),
        SplitBatchNorm2d(6, 2),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
        nn.Flatten(),
        nn.Linear(144, 5),
    ]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def make_update(decay_norm_and_bias: bool = True) -> tuple[nn.Module, nn.Module, MomentumUpdate]:
    query = network()
    key = copy.deepcopy(query).requires_grad_(False)
    flat = [FlatParameters(module, decay_norm_and_bias=decay_norm_and_bias) for module in (query, key)]
    return query, key, MomentumUpdate(*flat, sgd_momentum=SGD_M, weight_decay=DECAY)


def images(seed: int) -> Tensor:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


def scalars(lr: float = LR, m: float = M) -> tuple[Tensor, Tensor]:
    return torch.tensor(lr, dtype=torch.float64), torch.tensor(m, dtype=torch.float64)


@pytest.mark.parametrize("decay_norm_and_bias", [True, False])
def test_it_is_torch_sgd_and_a_moving_average(decay_norm_and_bias: bool) -> None:
    query, key, update = make_update(decay_norm_and_bias)
    plain, average = network(), network()
    weights = [plain[0].weight, plain[3].weight, plain[5].weight]
    others = [p for p in plain.parameters() if all(p is not w for w in weights)]
    groups = [{"params": weights}, {"params": others, "weight_decay": DECAY if decay_norm_and_bias else 0.0}]
    sgd = torch.optim.SGD(groups, lr=LR, momentum=SGD_M, weight_decay=DECAY)
    for step in range(5):
        x = images(step)
        sgd.zero_grad()
        plain(x).square().mean().backward()
        sgd.step()
        with torch.no_grad():
            for p_k, p_q in zip(average.parameters(), plain.parameters(), strict=True):
                p_k.copy_(M * p_k + (1 - M) * p_q)
        query(x).square().mean().backward()
        update.query.collect_gradients()
        update(*scalars(), YES)
    for ours, theirs in ((query, plain), (key, average)):
        for (name, found), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_one_update_by_hand() -> None:
    flat = [FlatParameters(nn.Linear(1, 1, bias=False).requires_grad_(trained)) for trained in (True, False)]
    update = MomentumUpdate(*flat, sgd_momentum=0.5, weight_decay=0.1)
    query, key, grads = flat[0].values, flat[1].values, flat[0].grads
    assert grads is not None
    query[0], key[0], grads[0], update.momentum_buffer[0] = 2.0, 1.0, 0.3, 4.0
    update(*scalars(lr=0.2, m=0.75), YES)
    # u = 0.5·4 + 0.3 + 0.1·2 = 2.5, θ = 2 − 0.2·2.5 = 1.5, φ = 0.75·1 + 0.25·1.5 = 1.125
    found = [tensor[0].item() for tensor in (update.momentum_buffer, query, key)]
    assert found == pytest.approx([2.5, 1.5, 1.125])


@pytest.mark.parametrize("gradient", [1.0, float("nan"), float("inf")])
def test_a_refused_update_changes_no_bit(gradient: float) -> None:
    _, _, update = make_update()
    assert update.query.grads is not None
    update.query.grads.fill_(1.0)
    update(*scalars(), YES)
    update.momentum_buffer[0] = -0.0
    tensors = (update.query.values, update.key.values, update.momentum_buffer)
    before = [t.view(torch.int32).clone() for t in tensors]
    update.query.grads.fill_(gradient)
    update(*scalars(), NO)
    assert all(torch.equal(t.view(torch.int32), b) for t, b in zip(tensors, before, strict=True))


def test_flat_buffers_keep_the_module_as_it_was() -> None:
    module, twin = network(), network()
    flat = FlatParameters(module)
    assert list(module.state_dict()) == list(twin.state_dict())
    for (name, found), expected in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name
    assert torch.equal(module(images(0)), twin(images(0)))
    assert module.get_parameter("0.weight").is_contiguous(memory_format=torch.channels_last)
    assert module.get_parameter("3.weight").stride() == (6, 1, 6, 6)
    assert all(p.data_ptr() % 128 == flat.values.data_ptr() % 128 for p in module.parameters())


def test_gradients_and_statistics_land_in_the_flat_buffers() -> None:
    module, twin = network(), network()
    flat = FlatParameters(module)
    for model in (module, twin):
        model(images(1)).square().sum().backward()
    flat.collect_gradients()
    assert all(p.grad is None for p in module.parameters())
    assert flat.grads is not None
    assert flat.is_intact()
    for (name, found), expected in zip(
        sorted(flat.named(flat.grads).items()), sorted(twin.named_parameters()), strict=True
    ):
        assert name == expected[0]
        torch.testing.assert_close(found, expected[1].grad, rtol=1e-5, atol=1e-5)
    assert torch.equal(flat.buffers[:6], twin.get_buffer("1.running_mean"))


def test_a_parameter_without_gradient_has_gradient_0() -> None:
    module = network()
    flat = FlatParameters(module)
    assert flat.grads is not None
    flat.grads.fill_(7.0)
    module[0](images(1)).sum().backward()
    flat.collect_gradients()
    named = flat.named(flat.grads)
    assert named["0.weight"].abs().sum() > 0
    assert all(not gradient.any() for name, gradient in named.items() if not name.startswith("0."))


def test_loading_a_state_fills_the_flat_buffers() -> None:
    module = network()
    flat = FlatParameters(module)
    module.load_state_dict({n: torch.full_like(t, 2) for n, t in module.state_dict().items()})
    assert flat.is_intact()
    assert flat.values.sum().item() == 2 * sum(p.numel() for p in module.parameters())
    assert flat.buffers.sum().item() == 2 * 12
    assert flat.counters.sum().item() == 2


def test_what_decays_comes_first() -> None:
    flat = FlatParameters(network(), decay_norm_and_bias=False)
    first = [slot.name for slot in flat.slots if slot.offset < flat.num_decayed]
    assert first == ["0.weight", "3.weight", "5.weight"]
    assert FlatParameters(network()).num_decayed == flat.values.numel()


@pytest.mark.parametrize("tear", ["double", "assign"])
def test_torn_views_are_noticed(tear: str) -> None:
    module = network()
    flat = FlatParameters(module)
    assert flat.is_intact()
    if tear == "double":
        module.double()
    else:
        module.load_state_dict(network().state_dict(), assign=True)
    assert not flat.is_intact()
