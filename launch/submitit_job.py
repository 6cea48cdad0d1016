"""Train in a SLURM job that submitit writes and submits; it needs `pip install submitit`.

    python launch/submitit_job.py --nodes 4 --ranks-per-node 2 https://host/model-0a1b2c3d.pth --steps 100

What follows the options goes to launch/train.py, which saves its state now and then. Before the time limit, and when
the job is preempted, submitit queues it again, and it goes on from what it has saved.
"""

import argparse
import sys
from pathlib import Path

import submitit


class Training:
    """What each rank of the job does. submitit pickles it, and makes another one when it queues the job again."""

    def __init__(self, words):
        self.words = words
        self.directory = str(Path(__file__).resolve().parent)

    def __call__(self):
        # RANK, WORLD_SIZE, MASTER_ADDR and so on. Which GPU is a rank's own is train.py's business.
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        sys.path.insert(0, self.directory)
        from train import train

        # A requeued job has its id, and so its folder, again.
        checkpoint = submitit.JobEnvironment().paths.folder / "checkpoint.pt"
        train(["--checkpoint", str(checkpoint), *self.words])

    def checkpoint(self):
        return submitit.helpers.DelayedSubmission(Training(self.words))


def parse_arguments():
    parser = argparse.ArgumentParser(description="Submit launch/train.py to SLURM.", allow_abbrev=False)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--ranks-per-node", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, help="default: one a rank; 0 for none")
    parser.add_argument("--cpus-per-rank", type=int, default=2)
    parser.add_argument("--minutes", type=int, default=240, help="time limit")
    parser.add_argument("--logs", type=Path, default=Path("submitit-logs"), help="directory that all nodes share")
    parser.add_argument("--partition")
    return parser.parse_known_args()


def submit():
    options, words = parse_arguments()
    gpus = options.ranks_per_node if options.gpus_per_node is None else options.gpus_per_node
    executor = submitit.AutoExecutor(folder=options.logs / "%j")
    executor.update_parameters(
        name="train",
        nodes=options.nodes,
        tasks_per_node=options.ranks_per_node,
        gpus_per_node=gpus,
        cpus_per_task=options.cpus_per_rank,
        timeout_min=options.minutes,
        slurm_partition=options.partition,
        # Without --kill-on-bad-exit the other ranks hold their GPUs until their collectives time out.
        slurm_srun_args=["--kill-on-bad-exit=1"],
        slurm_additional_parameters={"requeue": True},
    )
    job = executor.submit(Training(words))
    print(f"job {job.job_id} writes to {job.paths.folder}")


if __name__ == "__main__":
    submit()
