"""Classify handwritten digits with plain DDP, with checkpoints: whenever it stops, the same command goes on.

torchrun --standalone --nproc-per-node 2 examples/ddp_resume.py --epochs 4 --losses losses.txt
dltrain launch --nproc-per-node 2 examples/ddp_resume.py --epochs 4 --losses losses.txt
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32, help="samples per rank and step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--checkpoint", type=Path, default=Path("digits.pt"))
    parser.add_argument("--stop-after", type=int, help="stop after this many steps, as at the end of a time slot")
    parser.add_argument("--losses", type=Path, default=Path("losses.txt"), help="file for one line per step")
    return parser.parse_args()


def digits() -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels))


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )


def save(path: Path, model: DistributedDataParallel, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write the checkpoint from rank 0, so that at any time the old or the new one is there as a whole."""
    if dist.get_rank() == 0:
        new = path.with_suffix(".new")
        torch.save({"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, new)
        new.replace(path)


def log(path: Path, step: int, loss: torch.Tensor) -> None:
    """Write the mean of the ranks' losses."""
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    if dist.get_rank() == 0:
        with path.open("a" if step > 1 else "w") as file:
            print(step, mean.item(), file=file)


def train(args: argparse.Namespace, device: torch.device) -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(network().to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    done = 0
    if args.checkpoint.exists():
        state = torch.load(args.checkpoint, map_location=device, weights_only=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
        print(f"going on from step {done}")

    data = digits()
    sampler = DistributedSampler(data, seed=0, drop_last=True)
    loader = DataLoader(data, args.batch_size, sampler=sampler, drop_last=True)
    for epoch in range(done // len(loader), args.epochs):
        sampler.set_epoch(epoch)
        for step, (images, labels) in enumerate(loader, start=epoch * len(loader) + 1):
            if step <= done:
                continue
            loss = cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            log(args.losses, step, loss)
            if step == args.stop_after:
                save(args.checkpoint, model, optimizer, step)
                return
        save(args.checkpoint, model, optimizer, (epoch + 1) * len(loader))


@record
def main() -> None:
    args = parse()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    train(args, torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
