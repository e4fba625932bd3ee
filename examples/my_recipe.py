"""A recipe of your own: any model that can say its loss, here a GRU that reads a digit row by row.

cd examples && dltrain launch --nodes 2 recipe=my_recipe:MyRecipe model.width=64 train.optimizer.lr=0.01
"""

from collections.abc import Mapping

import torch
from dltrain import Batch, Layout
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Reader(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(8, width, batch_first=True)
        self.logits = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.gru(images.squeeze(1))[0][:, -1])


class MyRecipe:
    def __init__(self, width: int = 32) -> None:
        self.width = width

    def parts(self) -> dict[str, nn.Module]:
        return {"reader": Reader(self.width)}

    def layout(self, part: str) -> Layout:
        return Layout(units=("gru", "logits"))

    def loss(self, part: str, parts: Mapping[str, nn.Module], batch: Batch) -> Tensor:
        return cross_entropy(parts[part](batch["x"]), batch["y"])

    def metrics(self, parts: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        logits = parts["reader"](batch["x"])
        return {"accuracy": (logits.argmax(dim=1) == batch["y"]).to(torch.float32)}
