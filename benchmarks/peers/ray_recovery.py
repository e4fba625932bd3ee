"""Ray Train's side of ``benchmarks/recovery.py``: ``python ray_recovery.py OUT RANKS``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def loop(config: dict[str, Any]) -> None:
    sys.path.insert(0, config["here"])
    import recovery_loop

    recovery_loop.main(Path(config["out"]))


def main() -> None:
    out, ranks = Path(sys.argv[1]), int(sys.argv[2])
    ray.init(num_cpus=ranks + 1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    TorchTrainer(
        loop,
        train_loop_config={"out": str(out), "here": str(Path(__file__).parent)},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=ranks),
        run_config=RunConfig(
            name="benchmark", storage_path=str(out / "ray-train"), failure_config=FailureConfig(max_failures=-1)
        ),
    ).fit()


if __name__ == "__main__":
    main()
