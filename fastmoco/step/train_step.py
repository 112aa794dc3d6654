"""One training step, from views to the updated parameters, without reading device values on the host.

B batch · R ranks that share it · C embedding · K negatives · N keys of a step (B, or 2B when symmetric)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fastmoco.errors import ConfigError
from fastmoco.model.batchnorm.split import use_kernels
from fastmoco.model.dictionaries import Dictionary
from fastmoco.model.moco import MoCo
from fastmoco.model.resnet import fuse_convolutions
from fastmoco.registry import OBJECTIVES, OPTIMIZERS
from fastmoco.step.flat_params import FlatParameters, join_buffers
from fastmoco.step.gradients import GradientReducer
from fastmoco.step.kernels import FUSED, check_kernels, own_kernels
from fastmoco.step.loss_scaler import LossScaler
from fastmoco.step.objective import Objective
from fastmoco.step.optimizer import Optimizer
from fastmoco.step.state_dict import copy_state
from pipelines.registry import load
from pipelines.views import Views

# max-autotune's own CUDA graphs refuse buffers that a step changes, which batch norm's are.
_COMPILE_MODES = {"off": None, "default": "default", "max-autotune": "max-autotune-no-cudagraphs"}


D = TypeVar("D", bound=Dictionary)


class TrainStep(Generic[D]):
    """`step(views, lr, ema_momentum)`: forward, InfoNCE, backward, update, enqueue.

    dictionary              source of keys and negatives: a `KeyQueue`, or one of `model.dictionaries`
    temperature             τ of InfoNCE
    symmetric               use the exchanged views too; the losses are added, both sets of keys enter the queue
    sgd_momentum            momentum of SGD
    weight_decay            L2 penalty of SGD
    decay_norm_and_bias     whether it applies to normalisation layers and biases, as in the authors' code
    dtype                   float32, or bfloat16 or float16 under autocast (float16 with loss scaling)
    compile                 "off", "default" or "max-autotune": how the encoders are compiled, forward and backward
    kernels                 "torch", or "triton" for fused batch norm, InfoNCE and update; in compiled encoders too
    checkpoint_activations  recompute activations in the backward pass (`fastmoco.model.resnet.Backbone`)
    stem_format             memory format of the first convolution, "channels-last" or "contiguous"
    half_gradients          all-reduce the gradients in bfloat16
    objective, optimizer    keys of `fastmoco.registry.OBJECTIVES` and `OPTIMIZERS`

    With several ranks (`model.world`) each trains on its shard of the batch, and all end a step with the same bits:
    gradients, batch norm statistics and losses are averaged and keys gathered, so that the step is that of one rank on
    the whole batch.

    A step whose loss, gradient or batch norm statistics are not finite changes no bit of parameters, momentum buffer,
    batch norm statistics and dictionary, and is counted as skipped. That is decided on the device; `read_metrics`
    reports it. A learning rate that makes parameters overflow in the update itself shows in the loss of the next step.

    If the encoders are tied, their gradients are added, and the key encoder gets the query encoder's new weights
    whatever ema_momentum is.

    The model and the dictionary must be on their device. The model's parameters are moved into flat buffers here: load
    weights into it before or after, but do not move it to another device or type.
    """

    def __init__(
        self,
        model: MoCo,
        dictionary: D,
        *,
        temperature: float,
        symmetric: bool,
        sgd_momentum: float,
        weight_decay: float,
        decay_norm_and_bias: bool = True,
        dtype: torch.dtype = torch.float32,
        compile: str = "off",
        kernels: str = "torch",
        checkpoint_activations: bool = False,
        stem_format: str = "channels-last",
        half_gradients: bool = False,
        objective: str = "info-nce",
        optimizer: str = "sgd",
    ) -> None:
        if compile not in _COMPILE_MODES:
            raise ConfigError(f"unknown compile mode {compile!r}; expected one of {', '.join(_COMPILE_MODES)}")
        if temperature <= 0:
            raise ConfigError(f"the temperature is {temperature}; give a positive number, such as 0.07 or 0.2")
        assert stem_format in ("channels-last", "contiguous"), stem_format  # auto is resolved before
        assert model.tied == dictionary.TIED, "encoders must be tied if and only if keys need gradients"
        self.device = next(model.parameters()).device
        check_kernels(kernels, self.device)
        mode = _COMPILE_MODES[compile]
        assert mode is None or not checkpoint_activations, "torch.compile itself selects the activations to keep"
        self.model = model.train()
        self.dictionary = dictionary
        self.temperature = temperature
        self.symmetric = symmetric
        self.dtype = dtype
        self.query = FlatParameters(model.query, decay_norm_and_bias=decay_norm_and_bias)
        self.key = FlatParameters(model.key, decay_norm_and_bias=decay_norm_and_bias)
        self._statistics = join_buffers(self.query, self.key)
        if dtype != torch.float32 and not checkpoint_activations:
            model.weights = self.query.keep_rounded(dtype), self.key.keep_rounded(dtype)
        self.world = model.world
        self._gradient_reducer = GradientReducer(
            model.query, self.query, self.world, half=half_gradients, overlap=not model.tied
        )
        elsewhere = {tensor.device for tensor in dictionary.state_dict().values()} - {self.device}
        assert not elsewhere, (elsewhere, self.device)
        self.update: Optimizer = load(OPTIMIZERS[optimizer])(
            self.query, self.key, sgd_momentum=sgd_momentum, weight_decay=weight_decay, kernels=own_kernels(kernels)
        )
        self.objective: Objective = load(OBJECTIVES[objective])(temperature=temperature, kernels=own_kernels(kernels))
        use_kernels(model, own_kernels(kernels))
        if not fuse_convolutions(model, kernels == FUSED and mode is None) and kernels == FUSED:
            raise ConfigError(
                "--kernels triton-fused fuses the 1×1 convolutions of bottleneck blocks, and this backbone has none: "
                "use --kernels triton"
            )
        for encoder in (model.query, model.key):  # the key encoder has a backward only if the encoders are tied
            if hasattr(encoder.backbone, "checkpoint_activations"):
                encoder.backbone.checkpoint_activations = checkpoint_activations
            elif checkpoint_activations:
                raise ConfigError("this backbone does not support --checkpoint-activations: leave it out")
            if hasattr(encoder.backbone, "stem_format"):
                encoder.backbone.stem_format = stem_format
            elif stem_format != "channels-last":
                raise ConfigError(f"this backbone does not support --stem-format {stem_format}: leave it out")
        self.scaler = LossScaler(self.device) if dtype == torch.float16 else None
        self.lr = torch.zeros((), dtype=torch.float64, device=self.device)
        self.ema_momentum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._no_momentum = torch.zeros_like(self.ema_momentum)
        # Counts are float64, exact to 2^53, so that one stacked tensor brings them all to the host.
        sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=self.device)
        self._sums: dict[str, Tensor] = dict(zip(_SUMS, sums, strict=True))
        if mode is not None:
            model.compile_encoders(mode=mode)

    def __call__(self, views: Views, lr: float, ema_momentum: float) -> None:
        """Train on one batch without waiting for the device. lr and ema_momentum are from `step.schedules`."""
        self.round_if_changed()
        self.lr.fill_(lr)
        self.ema_momentum.fill_(ema_momentum)
        self.run(views)

    def run(self, views: Views) -> None:
        """The step with the lr and ema_momentum on the device: kernels only, always the same ones."""
        assert self.query.grads is not None
        statistics = self._statistics.clone()

        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            batches = self.dictionary.contrast_batches(self.model, views, self.symmetric)
        loss = torch.stack([self.objective(batch, self.world.rank) for batch in batches]).sum()
        averages = self._average(loss.detach())
        scale = None if self.scaler is None else self.scaler.scale
        if self.world.size > 1:
            loss = loss / self.world.size  # so that the sum of all ranks' gradients is their mean
        (loss if scale is None else loss * scale).backward()
        if not self._gradient_reducer.overlaps:
            self.query.collect_gradients()
        if self.key.grads is not None:
            self.key.collect_gradients()
            self.query.grads.add_(self.key.grads)
        self._gradient_reducer.finish()
        loss = averages()
        # All ranks decide alike, from the same mean loss, mean statistics and sums of gradients. The largest magnitude
        # takes one pass without a temporary, and NaN and infinity propagate. The gradients are still scaled, which
        # changes nothing, because the scale is 1 or more. Statistics can be infinite while loss and gradient are
        # finite: what batch norm divides by an infinite deviation is 0, and the loss that of chance.
        changed = [
            flat for flat in (self.query.grads, self._statistics) if flat.numel()
        ]  # a model may have no statistics
        largest = [torch.linalg.vector_norm(flat, ord=float("inf")) for flat in changed]
        ok = torch.isfinite(torch.stack([loss, *largest])).all()

        self.update(self.lr, self._no_momentum if self.model.tied else self.ema_momentum, ok, scale)
        self._statistics.copy_(torch.where(ok, self._statistics, statistics))
        self.dictionary.update(batches, views, ok)
        if self.scaler is not None:
            self.scaler.update(ok)
        self._count(loss, ok)

    def round(self) -> None:
        """After a collective has changed parameters: let the rounded ones follow."""
        self.query.round()
        self.key.round()

    def round_if_changed(self) -> None:
        """Before a step: let the rounded parameters follow, if weights have been loaded into the model."""
        self.query.round_if_changed()
        self.key.round_if_changed()

    def _average(self, loss: Tensor) -> Callable[[], Tensor]:
        """Start to average the loss and batch norm statistics of the forward pass over the ranks.

        Call the returned function after the backward: it stores the mean statistics and returns the mean loss.
        """
        if self.world.size == 1:
            return lambda: loss
        pending = self.world.all_reduce(torch.cat([self._statistics, loss[None]]))

        def finish() -> Tensor:
            means = pending.wait().div_(self.world.size)
            self._statistics.copy_(means[:-1])
            return means[-1]

        return finish

    def changed_tensors(self) -> list[Tensor]:
        """Every tensor that `run` writes and a later step, a checkpoint or `read_metrics` reads."""
        tensors = [*self.update.state().values(), *self.dictionary.state_dict().values()]
        tensors += [flat.rounded for flat in (self.query, self.key) if flat.rounded is not None]
        tensors += [self.query.values, self.key.values, self._statistics]
        tensors += self._sums.values()
        if self.scaler is not None:
            tensors += [self.scaler.scale, self.scaler.good_steps]
        return tensors

    def _count(self, loss: Tensor, ok: Tensor) -> None:
        sums = self._sums
        sums["loss_sum"].add_(torch.where(ok, loss, 0.0))
        sums["steps"].add_(1.0)
        sums["skipped_steps"].add_(~ok)
        sums["consecutive_skipped"].add_(1.0).mul_(~ok)

    def read_metrics(self, *, check_state: bool = False) -> dict[str, float]:
        """Metrics since the last call, in one transfer that waits for the device; call it every N steps.

        loss                 mean over the steps that were not skipped; NaN if there are none
        steps                number of steps, including skipped ones
        skipped_steps        number of skipped steps
        consecutive_skipped  number of skipped steps up to now without a good one, also from before the last call
        state_not_finite     with `check_state`: 1 if an encoder, its statistics, the optimiser or the dictionary has a
                             value that is not finite, else 0
        """
        stacked = [self._sums[name] for name in _SUMS]
        if check_state:
            largest = [torch.linalg.vector_norm(tensor, ord=float("inf")).double() for tensor in self._lasting_state()]
            stacked.append(torch.isfinite(torch.stack(largest)).logical_not().any().double())
        values = torch.stack(stacked).tolist()
        sums = dict(zip(_SUMS, values[: len(_SUMS)], strict=True))
        for name in ("loss_sum", "steps", "skipped_steps"):
            self._sums[name].zero_()
        trained = sums["steps"] - sums["skipped_steps"]
        return {
            "loss": sums["loss_sum"] / trained if trained else float("nan"),
            **{name: int(sums[name]) for name in ("steps", "skipped_steps", "consecutive_skipped")},
            **({"state_not_finite": int(values[-1])} if check_state else {}),
        }

    def _lasting_state(self) -> list[Tensor]:
        """The floating-point tensors that a step leaves to the next one, each flat buffer once."""
        tensors = [self.query.values, self.key.values, self._statistics]
        tensors += [*self.update.state().values(), *self.dictionary.state_dict().values()]
        return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Live tensors: the optimiser's state by parameter name, the loss scaler and the sums.

        The model and the dictionary have their own state dicts.
        """
        detached = "the model was moved after the step was built"
        assert self.query.is_intact(), detached
        assert self.key.is_intact(), detached
        state = {name: self.query.named(buffer) for name, buffer in self.update.state().items()}
        state["sums"] = dict(self._sums)
        if self.scaler is not None:
            state["scaler"] = {"scale": self.scaler.scale, "good_steps": self.scaler.good_steps}
        return state

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Copy a `state_dict` into this step. Raises CheckpointError if names, shapes or types differ."""
        copy_state(state, self.state_dict())


_SUMS = ("loss_sum", "steps", "skipped_steps", "consecutive_skipped")
