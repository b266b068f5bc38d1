#!/bin/bash
# Stage 1 on two machines of eight GPUs. From the root of the repository, until it is finished:
#     sbatch examples/slurm.sh
# TERM arrives two minutes before the time is up: the run saves itself, and --resume goes on.
# Not tried under Slurm. Tested are two agents on one machine and restarts by torchrun.
#SBATCH --job-name=dfm --dependency=singleton --nodes=2 --gpus-per-node=8 --ntasks-per-node=1
#SBATCH --time=24:00:00 --requeue --signal=TERM@120
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1    # or restarts hang: PyTorch's issue 135712
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes=2 --nproc_per_node=8 --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$first:29500" train_diagonal.py --resume
