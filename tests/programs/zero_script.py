"""A script as DeepSpeed's users launch it: ``deepspeed.initialize`` with the JSON that its command line names."""

import argparse
import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from torch import distributed, nn

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--steps", type=int, default=4)
parser = deepspeed.add_config_arguments(parser)
args = parser.parse_args()

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
torch.manual_seed(0)
model = nn.Linear(8, 1)
engine, *_ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
x = torch.randn(4, 8, generator=torch.Generator().manual_seed(distributed.get_rank()))
losses = []
for _ in range(args.steps * engine.gradient_accumulation_steps()):
    loss = engine(x).square().mean()
    engine.backward(loss)
    engine.step()
    losses.append(float(loss))
if distributed.get_rank() == 0:
    stage, batch = engine.zero_optimization_stage(), engine.train_batch_size()
    print(f"ZERO stage {stage} world {distributed.get_world_size()} batch {batch} fell {losses[-1] < losses[0]}")
distributed.destroy_process_group()
