"""Recipe: Co-Tuning with ``transformers.Trainer``. ``python examples/recipe_transformers.py``"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from recipe_fashion import SOURCE, TARGET, FashionTask, accuracy, pretrain, run
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import cotuning_kernels as ck


class CoTuningTrainer(Trainer):
    """A trainer whose model is a :class:`cotuning_kernels.CoTuningModel`."""

    def __init__(self, *args: Any, criterion: ck.FusedCoTuningLoss, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.criterion = criterion.to(self.args.device)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        labels = inputs.pop("labels")
        source_logits, target_logits = model(**inputs)
        loss: Tensor = self.criterion(source_logits, target_logits, labels)
        return (loss, {"logits": target_logits}) if return_outputs else loss


class AsMappings(Dataset[dict[str, Tensor]]):
    """Samples as mappings, as Trainer expects."""

    def __init__(self, task: FashionTask) -> None:
        self.task = task

    def __len__(self) -> int:
        return len(self.task)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        image, label = self.task[i]
        return {"pixel_values": image, "labels": label}


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = model(pixel_values=images).logits
    return logits


def main(epochs: int = 10, trade_off: float = 1.0) -> float:
    torch.manual_seed(0)
    # With real weights: AutoModelForImageClassification.from_pretrained("microsoft/resnet-50").
    config = ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic",
        num_labels=len(SOURCE),
    )  # fmt: skip
    pretrained = pretrain(ResNetForImageClassification(config), logits_of=logits_of)
    train = FashionTask(TARGET, 10)

    batches = [({"pixel_values": images}, labels) for images, labels in [default_collate(list(train))]]
    relationship = ck.learn_relationship(pretrained, batches, target_classes=train.classes, progress=False)
    model = ck.CoTuningModel.from_classifier(pretrained, len(TARGET)).train()
    with tempfile.TemporaryDirectory() as folder:
        trainer = CoTuningTrainer(
            model,
            TrainingArguments(
                folder, num_train_epochs=epochs, per_device_train_batch_size=10, use_cpu=not torch.cuda.is_available(),
                report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
                label_names=["labels"], max_grad_norm=5.0,
            ),
            train_dataset=AsMappings(train),
            eval_dataset=AsMappings(FashionTask(TARGET, 20, test=True)),
            optimizers=(torch.optim.SGD(model.param_groups(lr=3e-3), momentum=0.9, nesterov=True), None),
            criterion=ck.FusedCoTuningLoss(relationship, trade_off),
        )  # fmt: skip
        trainer.train()
        print(f"loss on test images {trainer.evaluate()['eval_loss']:.3f}")
    return accuracy(model.target_model(), logits_of)


if __name__ == "__main__":
    run(main, __doc__)
