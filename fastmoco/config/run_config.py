"""The configuration of a run: a tree of frozen dataclasses, validated on construction, with a JSON form.

Field names are unique across the tree, so that flags need no prefix (`moco_k`, `--moco-k`). Flags have the names of
facebookresearch/moco if it has an equivalent. The docstring of a field is its text in --help. For fields whose default
depends on the data, None stands for that default, and `run.resolve` replaces it before training starts. Errors are
`ConfigError`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Self

from fastmoco.config.augment import AugmentConfig, check_channels
from fastmoco.config.checks import as_object, check_types, group_types, known, parse_json
from fastmoco.config.data import DataConfig
from fastmoco.config.model import ModelConfig
from fastmoco.config.optim import OptimConfig
from fastmoco.config.run_options import RunOptions, ScaleOptions
from fastmoco.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run. The groups only order the flags in --help."""

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunOptions = field(default_factory=RunOptions)
    scale: ScaleOptions = field(default_factory=ScaleOptions)

    def __post_init__(self) -> None:
        check_types(self)
        for name in self.run.allow_changed:
            known(name.replace("-", "_"), self.flat(), "setting")
        check_channels(self.augment, self.data.channels)
        batch, splits = self.optim.batch_size, self.model.bn_splits
        if isinstance(batch, int) and splits is not None and (batch % splits or batch // splits < 2):
            fitting = max(2 * splits, batch - batch % splits)
            raise ConfigError(
                f"--batch-size {batch} cannot be split into {splits} equal groups of 2 or more for batch norm: "
                f"use --batch-size {fitting} or --bn-splits 1"
            )

    def flat(self) -> dict[str, Any]:
        """All fields and their values, without the groups."""
        return {name: value for group in group_types(RunConfig) for name, value in vars(getattr(self, group)).items()}

    def replace(self, **values: Any) -> Self:
        """A copy with these fields changed; names are without groups. Raises ConfigError."""
        for name in values:
            known(name, self.flat(), "field")
        changed = {}
        for group in group_types(RunConfig):
            in_group = {name: value for name, value in values.items() if name in vars(getattr(self, group))}
            changed[group] = dataclasses.replace(getattr(self, group), **in_group)
        return type(self)(**changed)

    def to_json(self) -> str:
        """The configuration as indented JSON; tuples become lists."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> RunConfig:
        """The inverse of `to_json`. Absent fields take their defaults; unknown or repeated ones raise ConfigError."""
        types, groups = group_types(RunConfig), {}
        for name, values in as_object(parse_json(text), "the configuration").items():
            known(name, types, "group")
            fields = as_object(values, f"group {name!r}")
            for key in fields:
                known(key, types[name].__dataclass_fields__, "field")
            groups[name] = types[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        return RunConfig(**groups)
