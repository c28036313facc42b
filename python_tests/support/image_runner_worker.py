"""Each process of a test in test_image_classification.py runs this: the image runner, also stopped and resumed.

``torchrun --nproc-per-node P image_runner_worker.py DATA FOLDER``; the results are in folders of ``FOLDER``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import image_classification as runner
import torch
from torch import distributed

from support.image_runner import StoppedError, arguments

NO_NOISE = "--model=support.image_runner:without_noise"
# Every kind of loss; test_distributed.py tests the reverse relationship.
METHODS = ("plain", "linear-probe", "l2-sp", "co-tuning")


def stop_after(steps: int) -> None:
    step = torch.optim.SGD.step
    taken = 0

    def stopping(*args: object, **kwargs: object) -> object:
        nonlocal taken
        taken += 1
        if taken > steps:
            torch.optim.SGD.step = step  # type: ignore[method-assign]
            raise StoppedError
        return step(*args, **kwargs)  # type: ignore[arg-type]

    torch.optim.SGD.step = stopping  # type: ignore[method-assign]


def main(data: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    # A process cannot leave a process group and join again: the first run joins, the last one leaves.
    leave = distributed.destroy_process_group
    distributed.destroy_process_group = lambda group=None: None
    assert runner.main(arguments(data, folder / "without_noise", NO_NOISE, "--methods", *METHODS)) == 0
    distributed.init_process_group = lambda **options: None
    # With dropout, which each process draws for itself.
    more = ("--methods", "co-tuning", "--checkpoint-every=2")
    assert runner.main(arguments(data, folder / "whole", *more)) == 0
    stop_after(5)
    try:
        runner.main(arguments(data, folder / "resumed", *more))
    except StoppedError:
        assert (folder / "resumed/co-tuning.checkpoint.safetensors").exists()
    assert runner.main(arguments(data, folder / "resumed", *more)) == 0
    distributed.destroy_process_group = leave
    assert runner.main(arguments(data, folder / "resumed", *more, "--seed=1")) == 1  # in every process
    os._exit(0)  # distributed_worker.py says why


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
