"""`smolds ladder slurm`: the jobs of a ladder, one for the learning rates and an array with a task for each rung."""

import argparse
import shlex
from pathlib import Path

from smolds_dist.ladder.results import open_ladder
from smolds_dist.ladder.run import RATES
from smolds_dist.launching.slurm import check_sbatch, fill, submit

SCRIPT = """\
#!/usr/bin/env bash
{directives}

# Before the time limit the runs save and `smolds ladder run` exits with code 75; the task is then requeued and resumes.
trap : TERM # it handles SIGTERM; wait for it
cd {folder} || exit
rungs=({rungs})
srun --ntasks=1{cores} {python} -m smolds_dist ladder run {options} --only "${{rungs[$SLURM_ARRAY_TASK_ID]}}"
code=$?
if [ "$code" -eq 75 ]; then scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"; fi
exit "$code"
"""


def write_jobs(folder: Path, options: argparse.Namespace) -> list[str]:
    """Write the batch scripts to the ladder's folder and submit them, if asked; return lines for the user.

    The rungs wait until the rates are found (`afterok`).

    Raises:
        ConfigError: if the plan or an option is invalid, or Slurm rejects a job.
    """
    ladder = open_ladder(folder)
    if options.submit:
        check_sbatch()
    jobs = {"rungs": [rung.name for rung in ladder.rungs]}
    if len(ladder.rates) > 1:
        jobs = {RATES: [RATES]} | jobs
    lines: list[str] = []
    before = ""
    for kind, names in jobs.items():
        path = folder / f"{kind}.sbatch"
        path.write_text(_script(folder, kind, names, options), encoding="utf-8")
        after = [f"--dependency=afterok:{before}"] if before else []
        if not options.submit:
            before = before or "JOB"
            lines.append(shlex.join(["sbatch", *after, str(path)]))
            continue
        before = submit(path, *after)
        lines.append(f"submitted job {before}: " + ("learning rates" if kind == RATES else f"{len(names)} rungs"))
    return lines


def _script(folder: Path, kind: str, names: list[str], options: argparse.Namespace) -> str:
    name = f"{folder.name}-{kind}".replace(" ", "-")
    directives = {
        "job-name": options.job_name or name, "array": f"0-{len(names) - 1}", "nodes": 1, "ntasks": 1,
        "gpus-per-node": options.gpus_per_node, "cpus-per-task": options.cpus_per_task,
        "signal": f"USR1@{options.warn}", "open-mode": "append", "time": options.time, "partition": options.partition,
        "account": options.account, "output": options.output or "slurm-%A_%a.out",
    }  # fmt: skip
    return fill(
        SCRIPT,
        directives,
        rungs=shlex.join(names),
        cores=f" --cpus-per-task={options.cpus_per_task}" if options.cpus_per_task else "",
        options=shlex.join([str(folder), f"--jobs={options.jobs}", f"--nproc-per-node={options.nproc_per_node}"]),
    )
