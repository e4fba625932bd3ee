"""A script as Accelerate's users launch it: what its launcher would set is printed, and all ranks meet."""

import json
import os
import sys

import torch
from torch import distributed

distributed.init_process_group("gloo")
total = torch.ones(())
distributed.all_reduce(total)
if distributed.get_rank() == 0:
    prefixes = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
    told = {name: value for name, value in os.environ.items() if name.startswith(prefixes)}
    print("FACTS", json.dumps({"ranks": int(total), "told": told, "args": sys.argv[1:]}))
distributed.destroy_process_group()
