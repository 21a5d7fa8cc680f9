# What the scripts of this folder share. They source it with $here set to this folder; it gives `tasks` and `start`.

# The submitting shell's ranks, if it had any, are not this job's.
unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT
cluster_env=${MEGADSL_CLUSTER_ENV:-$here/cluster.env}
if [ -f "$cluster_env" ]; then source "$cluster_env"; fi

venv=${MEGADSL_VENV:-$here/../.venv}
if [ -f "$venv/bin/activate" ]; then
    source "$venv/bin/activate"
elif [ -n "${MEGADSL_VENV:-}" ] && [ -z "${MEGADSL_CONTAINER:-}" ]; then
    echo "MEGADSL_VENV=$MEGADSL_VENV is not a virtual environment." >&2
    exit 2
fi
export MEGADSL_REQUEUE=${MEGADSL_REQUEUE:-scontrol}

# Since SLURM 22.05 srun no longer takes the CPUs per task from sbatch by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}

echo "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}: ${SLURM_NTASKS:-$SLURM_NNODES} tasks on $SLURM_JOB_NODELIST"
cd "$SLURM_SUBMIT_DIR"

start=(${MEGADSL_CONTAINER[@]+"${MEGADSL_CONTAINER[@]}"} python -m megadsl)

# tasks VERB ARGUMENTS: megadsl on every task.
# A task starts with USR1 ignored, else the early warning kills whoever has not installed its handler yet; megadsl does so at once.
# --wait: soon after the first task has ended the others are stopped, so that a dead rank ends the job. Not at once
# (--kill-on-bad-exit): every rank fails on the same mistake, and the first, which alone names it, may not be the fastest.
tasks() {
    local task='trap "" USR1
if [ "$SLURM_LOCALID" = 0 ]; then echo "task $SLURM_PROCID runs on $SLURMD_NODENAME"; fi
exec "$@"'
    srun --kill-on-bad-exit=0 --wait=20 bash -c "$task" task "${start[@]}" "$@"
}
