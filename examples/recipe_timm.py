"""Recipe: Co-Tuning of a timm model with timm's mixup, label smoothing and schedule. ``python examples/recipe_timm.py``

timm needs torchvision. Mixup gives class probabilities ``(B, N_t)``, which the criterion accepts.
"""

from __future__ import annotations

import timm
import torch
from recipe_fashion import SOURCE, TARGET, FashionTask, accuracy, pretrain, run
from timm.data.mixup import Mixup
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader

import cotuning_kernels as ck


def main(epochs: int = 20, trade_off: float = 1.0) -> float:
    torch.manual_seed(0)
    # With real weights: timm.create_model("resnet50", pretrained=True).
    pretrained = pretrain(timm.create_model("test_resnet", in_chans=1, num_classes=len(SOURCE)))
    train = FashionTask(TARGET, 10)

    relationship = ck.learn_relationship(pretrained, DataLoader(train, 16), progress=False)
    model = ck.CoTuningModel.from_classifier(pretrained, len(TARGET)).train()  # finds the head with get_classifier()
    criterion = ck.FusedCoTuningLoss(relationship, trade_off)
    mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=0.5, label_smoothing=0.1, num_classes=len(TARGET))
    optimizer = torch.optim.SGD(model.param_groups(lr=1e-2), momentum=0.9, nesterov=True)
    schedule = CosineLRScheduler(optimizer, t_initial=max(1, epochs), warmup_t=1, warmup_lr_init=1e-4)

    for epoch in range(epochs):
        schedule.step(epoch)
        for images, labels in DataLoader(train, 10, shuffle=True):
            images, target = mixup(images, labels)
            source_logits, target_logits = model(images)
            loss = criterion(source_logits, target_logits, target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
    return accuracy(model.target_model())


if __name__ == "__main__":
    run(main, __doc__)
