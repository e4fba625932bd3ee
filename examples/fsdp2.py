"""Train a small Transformer with FSDP2: sharded blocks, gradient clipping, AdamW, and the whole weights at the end.

torchrun --standalone --nproc-per-node 2 examples/fsdp2.py --steps 100 --losses losses.txt
dltrain launch --nproc-per-node 2 examples/fsdp2.py --steps 100 --losses losses.txt
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy


class DigitTransformer(nn.Module):
    """Reads an 8 × 8 image as a sequence of eight rows: ``[samples, 8, 8]`` to logits ``[samples, 10]``."""

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.places = nn.Parameter(torch.randn(8, width) / 10)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=4 * width, dropout=0.0, batch_first=True)
            for _ in range(depth)
        )
        self.logits = nn.Linear(width, 10)

    def forward(self, rows: Tensor) -> Tensor:
        x = self.embed(rows) + self.places
        for block in self.blocks:
            x = block(x)
        return self.logits(x.mean(dim=1))


def train(args: argparse.Namespace, device: torch.device) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = DigitTransformer().to(device)
    mesh = init_device_mesh(device.type, (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    images, labels = load_digits(return_X_y=True)
    rows = torch.tensor(images / 16, dtype=torch.float32).view(-1, 8, 8)
    targets = torch.tensor(labels)
    order = torch.Generator().manual_seed(0)
    lines: list[str] = []
    for step in range(1, args.steps + 1):
        mine = torch.randint(len(rows), (world, args.batch_size), generator=order)[rank]
        loss = cross_entropy(model(rows[mine].to(device)), targets[mine].to(device))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0).full_tensor()
        optimizer.step()
        mean = loss.detach() / world
        dist.all_reduce(mean)
        lines.append(f"{step} {mean.item()} {norm.item()}")

    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        args.losses.write_text("\n".join(lines) + "\n")
        if args.weights:
            torch.save(weights, args.weights)
        print("step, loss, gradient norm:", lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32, help="samples per rank and step")
    parser.add_argument("--losses", type=Path, default=Path("losses.txt"), help="file for one line per step")
    parser.add_argument("--weights", type=Path, help="file for the whole weights at the end")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    train(args, torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
