"""Recipe: Co-Tuning in a plain PyTorch loop, with a warm-up of the trade-off. ``python examples/recipe_pytorch.py``"""

from __future__ import annotations

import torch
from recipe_fashion import SOURCE, TARGET, FashionTask, accuracy, pretrain, run
from torch import nn
from torch.utils.data import DataLoader

import cotuning_kernels as ck


def small_network(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 7 * 7, num_classes),
    )  # fmt: skip


def main(epochs: int = 10, trade_off: float = 1.0, warm_up: int = 10) -> float:
    torch.manual_seed(0)
    pretrained = pretrain(small_network(len(SOURCE)))
    train = FashionTask(TARGET, 10)

    relationship = ck.learn_relationship(
        pretrained, DataLoader(train, 16), progress=False
    )  # no augmentation, no shuffle
    model = ck.CoTuningModel.from_classifier(pretrained, len(TARGET)).train()
    criterion = ck.FusedCoTuningLoss(relationship, trade_off)
    optimizer = torch.optim.SGD(model.param_groups(lr=3e-3), momentum=0.9, nesterov=True)

    step = 0
    for _ in range(epochs):
        for images, labels in DataLoader(train, 10, shuffle=True):
            criterion.trade_off = trade_off * min(1.0, step / warm_up)
            source_logits, target_logits = model(images)
            loss = criterion(source_logits, target_logits, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            step += 1
    return accuracy(model.target_model())


if __name__ == "__main__":
    run(main, __doc__)
