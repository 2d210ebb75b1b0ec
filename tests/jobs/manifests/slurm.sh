#!/bin/bash
#SBATCH --job-name=ergo-7b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --mem=400G
#SBATCH --gpus-per-node=4
#SBATCH --time=12:00:00
#SBATCH --exclusive
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --export=PATH,HOME,USER,REWARD_KEY,HF_TOKEN
# Variables are taken from the shell that calls sbatch; none is written here.
set -euo pipefail
# --export above would hide from every srun what is exported below.
export SLURM_EXPORT_ENV=ALL
cd '/home/me/ergo rl'
export PATH='/home/me/ergo rl'/.venv/bin:"$PATH" PYTHONPATH='/home/me/ergo rl'
export A='b c'
: "${REWARD_KEY:?is not set in the shell that called sbatch}"
: "${HF_TOKEN:?is not set in the shell that called sbatch}"

# Ray's nodes know one another by a token that only this user can read.
umask 077
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH='/home/me/ergo rl'/runs/.ray-token-"$SLURM_JOB_ID"
# scancel's TERM goes to every process of the job. Ray blocks it, because the run needs Ray to save, and lives as long
# as the token's file, which this script removes last.
keep='import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}); os.execvp("bash", ["bash", *sys.argv[1:]])'
while_token='"$@" & while [ -e "$RAY_AUTH_TOKEN_PATH" ] && kill -0 $! 2> /dev/null; do sleep 1; done; kill -KILL 0'
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
# Near the limit the run saves and goes on in a requeued job; after scancel it saves and stays ended.
driver="" limit_is_near="" stopping=""
stop() {
  stopping=yes
  [ -z "$driver" ] || kill -TERM "$driver" 2> /dev/null || true
}
trap 'limit_is_near=yes; stop' USR1
trap stop TERM
mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
python -c "import secrets; print(secrets.token_hex(32), end=str())" > "$RAY_AUTH_TOKEN_PATH"

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | cut -d " " -f 1)
srun --nodes=1 --ntasks=1 --nodelist="$head" \
  python -c "$keep" -c "$while_token" keep \
  ray start --head --node-ip-address="$address" --port=6379 --num-cpus=32 --num-gpus=4 --disable-usage-stats --block &
ray=$!
until ray status --address="$address:6379" > /dev/null 2>&1; do
  kill -0 $ray || { echo "Ray's head has ended" >&2; exit 1; }
  sleep 1
done
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
    python -c "$keep" -c "$while_token" keep \
    ray start --address="$address:6379" --num-cpus=32 --num-gpus=4 --disable-usage-stats --block &
fi

export RAY_ADDRESS="$address:6379"
python -m ergo_rl.jobs train configs/ergo-7b.yaml 'name=two words' &
driver=$!
[ -z "$stopping" ] || stop
while kill -0 "$driver" 2> /dev/null; do
  wait "$driver" || true # a signal ends it early
done
wait "$driver" && status=0 || status=$?
if [ "$limit_is_near" ] && [ "$status" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
