"""A model with everything that ZeRO's checkpoints treat apart, and such checkpoints of it, by DeepSpeed itself."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import dltrain
import torch
from torch import Tensor, nn


class Net(nn.Module):
    """A tied weight, a frozen layer, buffers, and sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.lin = nn.Linear(7, 5)
        self.norm = nn.BatchNorm1d(5)
        self.frozen = nn.Linear(5, 3).requires_grad_(False)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        return self.head(hidden).square().mean() + self.frozen(self.norm(self.lin(hidden))).square().mean()


class NetRecipe(dltrain.Recipe):
    def parts(self) -> dict[str, nn.Module]:
        return {"net": Net()}

    def loss(self, part: str, parts: Any, batch: Any) -> Tensor:
        return parts[part](batch["x"])


def save_zero(stage: int) -> int:
    """As a rank: train two steps under ZeRO, have DeepSpeed save, and save the gathered state dict beside it."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import safe_get_full_fp32_param

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)
    model = Net()
    whole = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": trained[:2]}, {"params": trained[2:], "weight_decay": 0.1}]
    zero = {"stage": stage} | ({"sub_group_size": 40, "stage3_param_persistence_threshold": 10} if stage == 3 else {})
    config = {"train_batch_size": 8, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    config["zero_force_ds_cpu_optimizer"] = False
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=0.05), config=config)
    for step in range(2):
        engine.backward(engine(torch.arange(4) + step))
        engine.step()
    engine.save_checkpoint("saved")
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            whole[name] = safe_get_full_fp32_param(parameter).clone()
    whole |= {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    whole["head.weight"] = whole["embed.weight"]
    if torch.distributed.get_rank() == 0:
        torch.save(whole, "whole.pt")
    torch.distributed.barrier()
    return 0


def write_job(folder: Path) -> Path:
    path = folder / "net.yaml"
    path.write_text("name: net\nrecipe: zero_saves:NetRecipe\n", encoding="utf-8")
    return path
