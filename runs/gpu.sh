# What the scripts for GPUs share; sourced by them, with PATIENCE set, and NODES and HEAD where there are several nodes.
requirements=requirements-gpu.txt
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
echo "PYTORCH_CUDA_ALLOC_CONF=$PYTORCH_CUDA_ALLOC_CONF"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else ranks that restart wait for those that died
where=(--nproc-per-node "$GPUS" --max-restarts 3 --shutdown-timeout "$PATIENCE")  # for torchrun
if [ "${NODES:-1}" = 1 ]; then
  where+=(--standalone)
else # every node runs this line; the first to reach HEAD leads
  where+=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-id ovr --rdzv-endpoint "${HEAD:?the name of the first node}:29500")
fi

ended() { # stage: else it was asked to stop, and the next one has nothing to start from
  [ -e "$OUT/$1/model" ] || { echo "$1 has stopped before its end; the same command goes on"; exit; }
}
