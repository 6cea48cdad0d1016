"""Train with Ray Train; it needs `pip install 'ray[train]'`, and a Ray cluster if there are several nodes.

    python launch/ray_train.py --workers 4 --storage /shared/runs https://host/model-0a1b2c3d.pth --steps 100

What follows the options goes to launch/train.py, which saves its state now and then. When a worker or its node dies,
Ray starts all workers again, and they go on from what was saved.
"""

import argparse
import sys
from pathlib import Path

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train_on_worker(config):
    """What each worker does. Ray has set RANK, WORLD_SIZE and so on, and has made the process group."""
    sys.path.insert(0, config["directory"])
    from train import train

    train(config["words"])


def parse_arguments():
    parser = argparse.ArgumentParser(description="Run launch/train.py on the workers of Ray Train.", allow_abbrev=False)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", action="store_true", help="one for each worker")
    parser.add_argument("--storage", type=Path, required=True, help="directory that all nodes share")
    parser.add_argument("--name", default="train", help="of the run: the same name goes on with the same run")
    parser.add_argument("--restarts", type=int, default=3, help="how often the workers may be started again")
    return parser.parse_known_args()


def main():
    options, words = parse_arguments()
    storage = options.storage.resolve()
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config={
            "directory": str(Path(__file__).resolve().parent),
            "words": ["--checkpoint", str(storage / options.name / "state.pt"), *words],
        },
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=options.gpus),
        run_config=RunConfig(
            name=options.name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=options.restarts),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
