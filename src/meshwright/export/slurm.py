"""A plan as a Slurm batch script that trains it by torchrun. In: an `ExportJob`. Out: text for sbatch."""

from __future__ import annotations

import shlex

from meshwright.export.job import Exported, ExportJob


def slurm(job: ExportJob) -> Exported:
    """One torchrun agent on every node, all meeting at the first."""
    name = f"meshwright-{job.model.name}".replace("/", "-")
    text = f"""\
#!/usr/bin/env bash
# {job.heading}
# sbatch FILE DATA [arguments of meshwright train]
#SBATCH --job-name={shlex.quote(name)}
#SBATCH --nodes={job.cluster.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={job.cluster.gpus_per_node}
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
set -euo pipefail
DATA="${{1:?sbatch FILE DATA}}"
shift
HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-1}}"
srun --kill-on-bad-exit=1 torchrun \\
  --nnodes {job.cluster.nodes} --nproc-per-node {job.cluster.gpus_per_node} \\
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$HEAD:29400" \\
  -m meshwright train {shlex.quote(job.plan_file)} --data "$DATA" "$@"
"""
    return Exported(text, ("partition, account and time limit are options of sbatch",))
