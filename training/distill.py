"""MAE-assisted distillation: the student, the loss, and the training step (Eq. 1 of the paper)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from training.loop import Processes, Trainer
from training.mae import Features, MaskedAutoencoder, mae_loss
from training.pretrain_recipe import PretrainRecipe
from training.teachers import Beit, MaeTeacher
from training.unlabelled import UnlabelledDataset


class Student(nn.Module):
    """What is trained: the autoencoder, and a linear map of its features where widths differ."""

    def __init__(self, recipe: PretrainRecipe, teacher_width: int | None) -> None:
        super().__init__()
        self.mae = MaskedAutoencoder(recipe)
        self.taught, self.whole = teacher_width is not None, recipe.teacher_sees == "image"
        self.attention = self.taught and "attention" in recipe.target
        self.match: nn.Module = nn.Identity()
        if self.taught and "features" in recipe.target and teacher_width != recipe.width:
            self.match = nn.Linear(recipe.width, teacher_width)

    def forward(self, image: Tensor, kept: Tensor) -> tuple[Tensor, Features | None]:
        """The autoencoder's prediction, and features to compare with the teacher's, if any."""
        encoder = self.mae.encoder
        features = encoder(image, kept, self.attention and not self.whole)
        prediction = self.mae.decoder(features.tokens, kept)
        if not self.taught:
            return prediction, None
        if self.whole:
            features = encoder(image, None, self.attention)
        return prediction, Features(self.match(features.tokens), features.attention)


def distillation_loss(student: Features, teacher: Features, recipe: PretrainRecipe) -> Tensor:
    """Eq. 1's MSE of features and, or, the divergence of the last block's attention maps."""
    loss = student.tokens.new_zeros((), dtype=torch.float32)
    if "features" in recipe.target:
        loss = loss + F.mse_loss(student.tokens.float(), teacher.tokens.float())
    if "attention" in recipe.target:
        divergence = attention_divergence(student.attention, teacher.attention)
        loss = loss + recipe.attention_weight * divergence
    return loss


def attention_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of (n, heads, tokens, tokens) maps, mean over their rows.

    Shares of some hundred tokens are too small for a squared error. Where the numbers of heads
    differ, the means over heads are compared.
    """
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    student, teacher = student.float().clamp(min=1e-8), teacher.float().clamp(min=1e-8)
    return (teacher * (teacher.log() - student.log())).sum(dim=-1).mean()


class PretrainTrainer(Trainer):
    """The trainer of training.fit with the losses of pretraining."""

    def __init__(
        self,
        student: Student,
        recipe: PretrainRecipe,
        steps: int,
        place: Processes,
        teacher: Beit | MaeTeacher | None,
    ) -> None:
        super().__init__(student, recipe, steps, place)
        self.teacher = teacher.to(place.device) if teacher else None
        self.parts: list[tuple[float, float]] = []  # L_MAE and distillation of the epoch's steps

    def losses(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """L_MAE and the distillation's loss of a batch."""
        recipe, image, kept = self.recipe, batch["image"], batch["kept"]
        with self.autocast:
            prediction, features = network(image, kept)
            if self.teacher is not None:
                shown = kept if recipe.teacher_sees == "kept" else None
                with torch.no_grad():
                    truth = self.teacher(image, shown, "attention" in recipe.target)
        mae = mae_loss(prediction, image, kept, recipe.variance_floor)
        if self.teacher is None:
            return mae, torch.zeros_like(mae)
        return mae, distillation_loss(features, truth, recipe)

    def _step(self, batch: dict[str, Tensor]) -> float:
        mae, distillation = self.losses(self.wrapped, batch)
        loss = distillation + self.recipe.mae_weight * mae
        self.parts.append((mae.item(), distillation.item()))
        return self._descend(loss)

    @torch.no_grad()
    def validate(self, held_out: UnlabelledDataset) -> tuple[float, float, float]:
        """Of the weights that count, on whole val images: L_MAE, what share of the variance within
        masked patches is explained (0: no more than each patch's mean is known), distillation.
        """
        network, recipe = self.evaluated.eval(), self.recipe
        keys = [(0, k) for k in range(len(held_out))]
        sums = np.zeros(3)
        for loaded in DataLoader(held_out, batch_size=min(64, recipe.batch), sampler=keys):
            batch = {name: tensor.to(self.place.device) for name, tensor in loaded.items()}
            image, kept = batch["image"], batch["kept"]
            mae, distillation = self.losses(network, batch)
            blank = image.new_zeros(len(image), recipe.grid**2, recipe.patch**2)
            nothing = mae_loss(blank, image, kept, recipe.variance_floor)
            sums += len(image) * np.array([mae.item(), nothing.item(), distillation.item()])
        mae, nothing, distillation = (sums / len(held_out)).tolist()
        return mae, 1 - mae / nothing if nothing else 0.0, distillation
