"""Recipe: Co-Tuning as a LightningModule. ``python examples/recipe_lightning.py``"""

from __future__ import annotations

import lightning
import torch
from recipe_fashion import SOURCE, TARGET, FashionTask, accuracy, pretrain, run
from recipe_pytorch import small_network
from torch import Tensor, nn
from torch.utils.data import DataLoader

import cotuning_kernels as ck


class CoTuning(lightning.LightningModule):
    """The relationship is a buffer of the criterion: it moves to the device and is in every checkpoint."""

    def __init__(self, pretrained: nn.Module, relationship: ck.Relationship, trade_off: float) -> None:
        super().__init__()
        self.model = ck.CoTuningModel.from_classifier(pretrained, relationship.num_target_classes)
        self.criterion = ck.FusedCoTuningLoss(relationship, trade_off)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        source_logits, target_logits = self.model(images)
        loss, target_term, source_term = self.criterion(source_logits, target_logits, labels, return_terms=True)
        self.log_dict({"target_term": target_term, "source_term": source_term}, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.param_groups(lr=3e-3), momentum=0.9, nesterov=True)


def main(epochs: int = 10, trade_off: float = 1.0) -> float:
    lightning.seed_everything(0, verbose=False)
    pretrained = pretrain(small_network(len(SOURCE)))
    train = FashionTask(TARGET, 10)

    relationship = ck.learn_relationship(pretrained, DataLoader(train, 16), progress=False)
    module = CoTuning(pretrained, relationship, trade_off)
    module.train()
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="auto", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=5.0,
    )  # fmt: skip
    trainer.fit(module, DataLoader(train, 10, shuffle=True))
    return accuracy(module.model.target_model())


if __name__ == "__main__":
    run(main, __doc__)
