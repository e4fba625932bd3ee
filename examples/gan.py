"""Draw handwritten digits with a hand-written GAN: two networks, two optimizers, both wrapped in DDP.

torchrun --standalone --nproc-per-node 2 examples/gan.py --steps 2000 --losses losses.txt
dltrain launch --nproc-per-node 2 examples/gan.py --steps 2000 --losses losses.txt
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel

NOISE = 16


def generator() -> nn.Module:
    return nn.Sequential(nn.Linear(NOISE, 128), nn.LeakyReLU(0.2), nn.Linear(128, 64), nn.Tanh())


def discriminator() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))


def against(logits: Tensor, truth: float) -> Tensor:
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, truth))


def picture(image: Tensor) -> str:
    """An image with values in [-1, 1] and shape [64] as eight lines of text."""
    rows = ((image.view(8, 8) + 1) * 2.5).long().clamp(0, 4).tolist()
    return "\n".join("".join(" .+*#"[value] for value in row) for row in rows)


def train(args: argparse.Namespace, device: torch.device) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights everywhere
    g, d = DistributedDataParallel(generator().to(device)), DistributedDataParallel(discriminator().to(device))
    g_optimizer = torch.optim.Adam(g.parameters(), lr=2e-4, betas=(0.5, 0.999))
    d_optimizer = torch.optim.Adam(d.parameters(), lr=2e-4, betas=(0.5, 0.999))
    images = torch.tensor(load_digits(return_X_y=True)[0] / 8 - 1, dtype=torch.float32)[rank::world]

    torch.manual_seed(1 + rank)  # other samples and other noise on each rank
    lines: list[str] = []
    for step in range(1, args.steps + 1):
        real = images[torch.randint(len(images), (args.batch_size,))].to(device)
        fake = g(torch.randn(args.batch_size, NOISE).to(device))

        judged = d(torch.cat([real, fake.detach()]))  # once, since DDP reduces after one backward of one forward
        d_loss = against(judged[: len(real)], 1.0) + against(judged[len(real) :], 0.0)
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()

        d.requires_grad_(False)
        g_loss = against(d.module(fake), 1.0)
        g_optimizer.zero_grad()
        g_loss.backward()
        g_optimizer.step()
        d.requires_grad_(True)

        losses = torch.stack([d_loss.detach(), g_loss.detach()]) / world
        dist.all_reduce(losses)
        lines.append(f"{step} {losses[0].item()} {losses[1].item()}")
    if rank == 0:
        args.losses.write_text("\n".join(lines) + "\n")
        print(picture(fake[0].detach().cpu()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32, help="samples per rank and step")
    parser.add_argument("--losses", type=Path, default=Path("losses.txt"), help="file for one line per step")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    train(args, torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
