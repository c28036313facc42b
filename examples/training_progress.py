"""The checkpoint of a training run: a file with a digest, from which a run resumes to the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from command_line import UserError
from torch import Tensor, distributed, nn

from cotuning_kernels.distributed import rank_and_size
from cotuning_kernels.tensor_file import TensorFile

__all__ = ["Progress"]

MEND = "remove it, and the same command trains this method from the beginning."
CHECKPOINT_FILE = TensorFile(
    format="cotuning_kernels.training", version=1, noun="a checkpoint of training", if_foreign=MEND, if_damaged=MEND,
    error=UserError,
)  # fmt: skip


class Progress:
    """Everything that a training step depends on, except the data, which follow from the seed and the iteration."""

    def __init__(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        self.path, self.model, self.optimizer, self.schedule = path, model, optimizer, schedule
        self.iteration, self.seconds = 0, 0.0
        self.device = next(model.parameters()).device

    def save(self) -> None:
        """The first process saves, with the random states of all processes."""
        rank, processes = rank_and_size()
        on_gpu = self.device.type == "cuda"
        random: list[Any] = [(torch.random.get_rng_state(), torch.cuda.get_rng_state(self.device) if on_gpu else None)]
        if processes > 1:
            everyones: list[Any] = [None] * processes
            distributed.all_gather_object(everyones, random[0])
            random = everyones
        if rank > 0:
            return
        state = {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": random,
        }
        tensors: dict[str, Tensor] = {}
        record = packed(state, tensors)
        CHECKPOINT_FILE.write(self.path, tensors, record)

    def load(self) -> None:
        if not self.path.exists():
            return
        tensors, record = CHECKPOINT_FILE.read(self.path)
        try:
            state = unpacked(record, tensors)
            self.iteration, self.seconds = int(state["iteration"]), float(state["seconds"])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            random, cuda_random = state["random"][rank_and_size()[0]]
            torch.random.set_rng_state(random)
            if cuda_random is not None:
                torch.cuda.set_rng_state(cuda_random, self.device)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.path} is damaged, or of another network ({type(error).__name__}: {error!s:.200}): {MEND}"
            ) from None


def packed(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """A tree of mappings, sequences, tensors and plain values as JSON that refers to the tensors by name.

    Unlike a pickle it runs no code when read. A tuple comes back as a list, a Counter as a dict.
    """
    if isinstance(value, Tensor):
        key = f"{len(tensors)}{name}"
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, Mapping):  # pairs, because JSON keys can only be strings
        return {"items": [[key, packed(item, tensors, f"{name}.{key}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [packed(item, tensors, f"{name}.{index}") for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which a checkpoint cannot hold")


def unpacked(record: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(record, list):
        return [unpacked(item, tensors) for item in record]
    if not isinstance(record, dict):
        return record
    if "tensor" in record:
        return tensors[record["tensor"]]
    return {key: unpacked(item, tensors) for key, item in record["items"]}
