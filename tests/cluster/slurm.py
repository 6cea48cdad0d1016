"""SLURM on the lab's hosts: the controller on head, one slurmd a node, with fake GPUs."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from cluster.lab import Lab
from cluster.templates import user_environment
from cluster.wait import wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "sinfo")

CONFIGURATION = """
ClusterName=lab
SlurmctldHost=head(10.77.0.1)
SlurmUser=root
SlurmdUser=root
# A requeued job waits until its old credential expired (default 120 s) before it may start again.
AuthInfo=socket={socket},cred_expire=5
StateSaveLocation={directory}/slurmctld
SlurmdSpoolDir={directory}/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=2,sched_interval=2
PropagateResourceLimits=NONE
ReturnToService=2
JobRequeue=1
# As on real clusters SLURM itself is slow to notice a dead node; the ranks must not wait for it.
SlurmdTimeout=300
MessageTimeout=20
TCPTimeout=2
BatchStartTimeout=5
KillWait=3
GresTypes=gpu
NodeName=node[1-{nodes}] CPUs=4 RealMemory=8000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=2 PreemptMode=OFF
PartitionName=preemptible Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 GraceTime=20
"""

FINAL_STATES = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY")


class Slurm:
    """SLURM on a running lab. Jobs inherit PATH and the variables given to `sbatch` or `srun`, nothing else."""

    def __init__(self, lab: Lab, gpus_per_node: int = 2) -> None:
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
        if missing:
            raise RuntimeError(f"SLURM needs {', '.join(missing)}: run tests/run.sh, which installs them")
        self.lab = lab
        self.directory = lab.run_dir / "slurm"
        self._configure(gpus_per_node)
        socket = "/run/munge.socket"  # in head's own /run, which its nodes see too
        munge = ("key-file", "pid-file", "seed-file", "log-file")
        files = [f"--{name}={self.directory}/munge/{name}" for name in munge]
        lab.run("head", "munged", "--force", "--num-threads=2", f"--socket={socket}", *files)
        self.run("slurmctld")
        for node in lab.nodes:
            self.start_slurmd(node)
        lab.when_node_starts.append(self.start_slurmd)
        self.wait_until_idle()

    # --- jobs -------------------------------------------------------------------------------------------------

    def run(self, *command: str | Path, host: str = "head", variables: Mapping[str, str] | None = None) -> str:
        """Run one of SLURM's commands and return its stdout."""
        return self.lab.run(host, *command, timeout=60, env=self._environment(variables or {}))

    def sbatch(self, directory: Path, *arguments: str | Path, **variables: str) -> Job:
        """Submit a batch script from `directory`, as a user would; its output goes to a file there."""
        output = ("--chdir", directory, "--output", "%j.out")
        job_id = self.run("sbatch", "--parsable", *output, *arguments, variables=variables).strip()
        return Job(self, job_id, directory / f"{job_id}.out")

    # --- nodes ------------------------------------------------------------------------------------------------

    def start_slurmd(self, node: str) -> None:
        (self.directory / node).mkdir(exist_ok=True)
        self.run("slurmd", "-N", node, host=node)

    def wait_until_idle(self, seconds: float = 120) -> None:
        """Wait until every node can take a job; a job that depended on the last one may just have begun."""
        count = len(self.lab.nodes)
        wait_until(lambda: len(self._idle_nodes()) == count, seconds, lambda: f"nodes not idle, see {self.directory}")

    def _idle_nodes(self) -> set[str]:
        # A node is in two partitions.
        return set(self.run("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N").split())

    # --- configuration ----------------------------------------------------------------------------------------

    def _configure(self, gpus_per_node: int) -> None:
        (self.directory / "munge").mkdir(parents=True)
        (self.directory / "munge" / "key-file").write_bytes(secrets.token_bytes(128))
        (self.directory / "munge" / "key-file").chmod(0o600)
        text = CONFIGURATION.format(
            directory=self.directory, socket="/run/munge.socket", nodes=len(self.lab.nodes), gpus=gpus_per_node
        )
        (self.directory / "slurm.conf").write_text(text)
        # SLURM 22.05 loads a cgroup plugin, used or not; naming one skips a detection that fails without systemd.
        (self.directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        # A GPU is a device file that SLURM hands out: it sets CUDA_VISIBLE_DEVICES whatever is behind it.
        for number in range(gpus_per_node):
            os.mknod(self.directory / f"gpu{number}", 0o020666, os.makedev(1, 3))
        (self.directory / "gres.conf").write_text(f"Name=gpu File={self.directory}/gpu[0-{gpus_per_node - 1}]\n")

    def _environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        return {**user_environment(), "SLURM_CONF": str(self.directory / "slurm.conf"), **variables}


class Job:
    """A submitted batch job."""

    def __init__(self, slurm: Slurm, job_id: str, output_path: Path) -> None:
        self.slurm = slurm
        self.id = job_id
        self.output_path = output_path

    def field(self, name: str) -> str:
        """One field of `scontrol show job`, such as JobState or Restarts."""
        shown = self.slurm.run("scontrol", "show", "job", self.id)
        match = re.search(rf"\b{name}=(\S*)", shown)
        assert match, f"no {name} in {shown}"
        return match[1]

    def output(self) -> str:
        """What the batch script and its ranks have printed so far, also into files of their own."""
        directory = self.output_path.parent
        paths = [
            *directory.glob(f"{self.id}[._]*out"),
            *directory.glob(f"*-{self.id}-rank*.out"),
        ]  # [_]: an array's task
        return "".join(path.read_text() for path in sorted(paths))

    def rank_output(self, rank: int) -> str:
        """What a rank with a log of its own has printed so far."""
        paths = self.output_path.parent.glob(f"*-{self.id}-rank{rank}.out")
        return "".join(path.read_text() for path in paths)

    def wait(self, seconds: float) -> str:
        """Wait for the job's end and return its final state; an array's is that of a task that failed, if one did."""

        def final_state() -> str | None:
            states = re.findall(r"\bJobState=(\S*)", self.slurm.run("scontrol", "show", "job", self.id))
            if not all(state in FINAL_STATES for state in states):
                return None
            return next((state for state in states if state != "COMPLETED"), "COMPLETED")

        # `sbatch --wait` and `srun` poll every few seconds; this finds the end sooner.
        state = wait_until(final_state, seconds, lambda: f"job {self.id} has not ended:\n{self.output()}")
        # The record says COMPLETED before every node is free again, and the next test wants them all.
        self.slurm.wait_until_idle()
        return state

    def succeeded(self, seconds: float) -> str:
        """The output of the job, which must end well."""
        state = self.wait(seconds)
        assert state == "COMPLETED", f"job {self.id} ended as {state}:\n{self.output()}"
        return self.output()
