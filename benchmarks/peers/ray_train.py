"""Ray Train's side of ``benchmarks/launch.py`` and ``benchmarks/recovery.py``.

    python ray_train.py first_step|recovery_loop OUT RANKS FAILURES

runs the program beside this file on so many ranks, and starts them again after as many failures (-1: any number).
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def loop(config: dict[str, Any]) -> None:
    sys.path.insert(0, config["here"])
    importlib.import_module(config["program"]).main(Path(config["out"]))


def main() -> None:
    program, out, ranks, failures = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    ray.init(num_cpus=ranks + 1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    TorchTrainer(
        loop,
        train_loop_config={"program": program, "out": str(out), "here": str(Path(__file__).parent)},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=ranks),
        run_config=RunConfig(
            name="benchmark", storage_path=str(out / "ray-train"), failure_config=FailureConfig(max_failures=failures)
        ),
    ).fit()


if __name__ == "__main__":
    main()
