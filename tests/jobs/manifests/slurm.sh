#!/bin/bash
#SBATCH --job-name=ergo-7b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --mem=400G
#SBATCH --gpus-per-node=4
#SBATCH --time=12:00:00
#SBATCH --exclusive
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --export=PATH,HOME,USER,REWARD_KEY,HF_TOKEN
# Variables are taken from the shell that calls sbatch; none is written here.
set -euo pipefail
cd '/home/me/ergo rl'
export PATH='/home/me/ergo rl'/.venv/bin:"$PATH" PYTHONPATH='/home/me/ergo rl'
export A='b c'
: "${REWARD_KEY:?is not set in the shell that called sbatch}"
: "${HF_TOKEN:?is not set in the shell that called sbatch}"

# Ray's nodes know one another by a token that only this user can read.
umask 077
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH='/home/me/ergo rl'/runs/.ray-token-"$SLURM_JOB_ID"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
python -c "import secrets; print(secrets.token_hex(32), end=str())" > "$RAY_AUTH_TOKEN_PATH"

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | cut -d " " -f 1)
srun --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --node-ip-address="$address" --port=6379 --num-cpus=32 --num-gpus=4 --disable-usage-stats --block &
sleep 15
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
    ray start --address="$address:6379" --num-cpus=32 --num-gpus=4 --disable-usage-stats --block &
fi

export RAY_ADDRESS="$address:6379"
python -m ergo_rl.jobs train configs/ergo-7b.yaml 'name=two words' &
driver=$!
# The limit is near, or scancel: the run saves; a requeued job goes on there.
trap 'kill -TERM $driver; wait $driver || true; scontrol requeue "$SLURM_JOB_ID"; exit 0' TERM
wait $driver
