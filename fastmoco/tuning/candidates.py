"""Ways to compute the training step, in the order in which they are preferred."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch

from fastmoco.config import ResolvedConfig
from fastmoco.console import counted
from fastmoco.model.resnet import SHAPES, has_bottlenecks
from fastmoco.step.kernels import FUSED, compiler_missing, fuses_convolutions, triton_missing
from pipelines.registry import BACKENDS

Auto = frozenset[str]


@dataclass(frozen=True)
class Candidate:
    """One way to compute the step. The fields are those of `config.RunOptions` with the same names."""

    amp: str
    kernels: str = "torch"
    compile: str = "off"
    stem_format: str = "channels-last"
    cuda_graph: str = "off"
    prefetch: str = "off"
    cpu_threads: int | None = None

    @property
    def arithmetic(self) -> Candidate:
        """What the values of a step depend on: two candidates with the same arithmetic differ in speed only."""
        return replace(self, prefetch="off", cpu_threads=None)

    def apply(self, config: ResolvedConfig) -> ResolvedConfig:
        """The configuration that trains in this way."""
        return ResolvedConfig.of(config.replace(**asdict(self)))

    @staticmethod
    def of(config: ResolvedConfig) -> Candidate:
        """The way in which a configuration trains."""
        return Candidate(**{name: getattr(config.run, name) for name in FIELDS})

    def __str__(self) -> str:
        parts = [self.amp, f"{self.kernels} kernels"]
        parts += [f"compile {self.compile}"] * (self.compile != "off")
        parts += ["contiguous stem"] * (self.stem_format != "channels-last")
        parts += ["CUDA graph"] * (self.cuda_graph == "on")
        parts += ["prefetch"] * (self.prefetch == "on")
        parts += [counted(self.cpu_threads, "thread")] if self.cpu_threads is not None else []
        return ", ".join(parts)


FIELDS = tuple(Candidate.__dataclass_fields__)


def without_graph(config: ResolvedConfig, auto: Auto, device: torch.device) -> Iterator[Candidate]:
    """The configured way, then those that may replace it if it fails, all without a CUDA graph.

    auto  the fields that were not given by name: only these may change. 16-bit formats come before float32, fused
          kernels, compiled or not, before encoders that are only compiled, and those before plain PyTorch.
    """
    first = replace(Candidate.of(config), cuda_graph="off")
    amps = [first.amp, "fp32"] if "amp" in auto and first.amp != "fp32" else [first.amp]
    for amp in amps:
        for kernels, compile in _implementations(first, auto, device, config.run.checkpoint_activations):
            yield replace(first, amp=amp, kernels=kernels, compile=compile)


def variations(
    best: Candidate, config: ResolvedConfig, auto: Auto, device: torch.device, *, compiles: bool
) -> list[list[Candidate]]:
    """Alternatives to `best`, one list for every dimension that is tuned; each differs from `best` in it only.

    compiles  whether to try torch.compile, which takes minutes
    """
    checkpointing = config.run.checkpoint_activations
    implementations = [
        replace(best, kernels=kernels, compile=compile)
        for kernels, compile in _implementations(best, auto, device, checkpointing)
    ]
    if (
        "kernels" in auto
        and device.type == "cuda"
        and has_bottlenecks(config.model.arch)
        and fuses_convolutions(device)
        and ("compile" in auto or best.compile == "off")
    ):
        implementations.append(replace(best, kernels=FUSED, compile="off"))
    if "compile" in auto and compiles and not checkpointing and compiler_missing(device) is None:
        implementations.append(replace(best, compile="default"))
    if not compiles:
        implementations = [c for c in implementations if c.compile in ("off", best.compile)]
    found = [implementations]
    if "cuda_graph" in auto and device.type == "cuda":
        found.append([replace(best, cuda_graph=value) for value in ("on", "off")])
    if "stem_format" in auto and config.model.arch in SHAPES:
        found.append([replace(best, stem_format=value) for value in ("channels-last", "contiguous")])
    if "prefetch" in auto and device.type == "cuda" and BACKENDS[config.data.pipeline].pipeline is None:
        found.append([replace(best, prefetch=value) for value in ("on", "off")])
    if "cpu_threads" in auto and device.type == "cpu":
        found.append([replace(best, cpu_threads=count) for count in _thread_counts()])
    return [[c for c in dict.fromkeys(dimension) if c != best] for dimension in found]


def _implementations(
    first: Candidate, auto: Auto, device: torch.device, checkpointing: bool
) -> Iterator[tuple[str, str]]:
    """(kernels, compile): those of `first`, then others that are available."""
    usual = "off" if "compile" in auto else first.compile
    found = [(first.kernels, first.compile), (first.kernels, usual)]
    if device.type == "cuda" and "kernels" in auto:
        compiled = "compile" in auto and not checkpointing and compiler_missing(device) is None
        found += [("triton", usual)] if triton_missing() is None else []
        found += [("torch", "default")] if compiled else []
        found += [("torch", usual)]
    yield from dict.fromkeys(found)


def _thread_counts() -> list[int]:
    most = torch.get_num_threads()
    return sorted({most, *(2**n for n in range(most.bit_length()) if 2**n <= most)}, reverse=True)
