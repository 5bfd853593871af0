#!/usr/bin/env bash
# Slurm: a run of several machines as one job, submitted from the project's folder:
#
#   CONFIG=<recipe> [ARGS="a.b=c …"] sbatch --nodes=2 scripts/slurm.sh [a.b=c …]
#
# One launcher a node; options of sbatch's command line win over those below, partition, account and
# NPUs (--gres) are the cluster's. Two minutes before the time limit the run saves, stops with exit
# status 143, and the job goes back into the queue, where it goes on from there; the same after a node
# has failed. A run that was at its last step ends with 0, and so does the job.
# scancel ends the job; scancel --batch --signal=TERM has it save and come back. (What Slurm does is
# from the manual pages of sbatch, srun, scontrol and scancel.)

#SBATCH --job-name=qwen35
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120

# Slurm runs a copy of this file, from a folder of its own
if [[ -n ${SLURM_JOB_ID:-} ]]; then scripts=$SLURM_SUBMIT_DIR/scripts; else scripts=$(dirname "${BASH_SOURCE[0]}"); fi
if [[ ! -f $scripts/common.sh ]]; then
    echo "slurm.sh: ${SLURM_SUBMIT_DIR:-} is not the project's folder: submit the job from there" >&2
    exit 2
fi
# shellcheck source=common.sh
source "$scripts/common.sh"
[[ -n ${SLURM_JOB_ID:-} ]] || die "is a job's script: sbatch --nodes=2 scripts/slurm.sh"
for name in HOSTS NODE_RANK NODE_ADDR; do
    [[ -z ${!name:-} ]] || die "$name=${!name}: Slurm says which machines there are; leave it out"
done
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
((${#hosts[@]})) || die "scontrol names no machine of SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST"
[[ ${NODES:-1} == 1 || $NODES == "${#hosts[@]}" ]] || die "NODES=$NODES, but the job has ${#hosts[@]} nodes: leave NODES out"
export NODES=${#hosts[@]} MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}}
secret=$(od -An -vtx8 -N32 /dev/urandom)
export RENDEZVOUS_SECRET=${RENDEZVOUS_SECRET:-${secret//[[:space:]]/}}

# a signal that srun gets goes to its tasks; the launchers have the run save and stop
asked=
trap 'asked=1 interrupted=1; kill -TERM "$child"' TERM
# shellcheck disable=SC2016 # each node has its own number
srun --ntasks-per-node=1 --kill-on-bad-exit=1 --label bash -c 'NODE_RANK=$SLURM_NODEID exec bash scripts/finetune.sh "$@"' node "$@" &
child=$!
await "$child"
if [[ -n $asked ]] && ((code == 143)); then # stopped before its last step
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
