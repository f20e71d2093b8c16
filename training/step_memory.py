"""Measures the memory of one step of a run, and predicts it (memory/measured.py)."""

from __future__ import annotations  # type hints must not load the classes of transformers

from collections.abc import Callable
from typing import TypeVar

import transformers
from torch.optim import Optimizer

from data.dataset import Batch
from memory import measured
from training import distributed
from training.options import Options
from training.preflight import step_settings

Result = TypeVar("Result")


class StepMemory:
    """The bytes of one step by component, predicted and measured.

    The step is the second of a run, because AdamW's moments exist then. `rows` is empty before, and
    in a sharded run, which the prediction does not cover.
    """

    def __init__(
        self, model: transformers.PreTrainedModel, optimizer: Optimizer, start: int, args: Options
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.args = args
        self.step = min(start + 1, args.max_steps - 1)
        self.rows: dict[str, dict[str, int | None]] = {}

    def measure(self, work: Callable[[], Result], step: int, batches: list[Batch]) -> Result:
        """Call `work`, which is the training step `step` on these batches. Returns its result."""
        if step != self.step or self.args.shard:
            return work()
        world_size = distributed.world_size()
        mine = batches[distributed.rank() :: world_size]
        settings = step_settings(self.args)
        result, self.rows = measured.measure_step(
            work, self.model, self.optimizer, mine, settings, world_size
        )
        return result
