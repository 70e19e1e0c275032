#!/usr/bin/env bash
# The paper's recipe at full size: Qwen2.5-VL-7B, one node of 8 GPUs or several. NOT YET RUN: it has
# been tested with small models on CPUs, part by part; no machine of several GPUs was at hand.
#
#   SFT=rows.jsonl RL=problems.jsonl bash runs/ovr_7b.sh                           # one node
#   NODES=8 HEAD=node001 SFT=... RL=... bash runs/ovr_7b.sh                        # on every node
#   srun --nodes 8 --ntasks-per-node 1 --gpus-per-node 8 --export ALL,NODES=8,HEAD=$(scontrol show
#     hostnames "$SLURM_JOB_NODELIST" | head -n 1) bash runs/ovr_7b.sh             # under Slurm
#
# First, on one node, where the Hub can be reached (a checkout that several nodes share is set up once):
#   bash -c 'requirements=requirements-gpu.txt; source runs/setup.sh; HF_HUB_OFFLINE=0 hf download Qwen/Qwen2.5-VL-7B-Instruct'
# Where nodes have several networks: export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 (or what yours is called)
# Every path must be seen by all nodes. Give the same command again after a failure: finished stages
# are kept, an unfinished one goes on from its newest checkpoint, also on another number of GPUs.
#
# Expected, derived by tools/plan.py and not measured (7.6 B parameters trained, 16 B of state each, 24k to 48k tokens a response):
#   memory    of 80 GB a GPU on 8: cold start 66; PPO 55 while it samples, 67 while it learns, 73 while weights go over
#             to the engine; 176 GB of host memory a node. With --recompute selective H200s are needed
#   time      cold start: 83 s a step of 640 sequences of 8k tokens on 8 H100, 15 days for 10 M; 46 h on 64
#             one PPO step of 8,192 x 10k tokens: 2 h on 8 H100 (70 min of it sampling), 19 min on 64 (900 steps: 12 days)
#   disk      17 GB a model in bfloat16, 200 GB the state of one PPO checkpoint (two are kept)
# Before it: python -m tools.doctor --model Qwen/Qwen2.5-VL-7B-Instruct --data problems.jsonl --sampler vllm --gpus 8 --offload \
#     --recompute full --lr 1e-6 --prompt-tokens 8192 --pack-tokens 65536 --length 49152 --kv-cache-gb 32
# Watch it: tail -f $OUT/rl/metrics.jsonl; cat $OUT/rl/heartbeat/*.json
set -euo pipefail
: "${SFT:?the rows of the cold start: prompt, response}" "${RL:?the problems: prompt, images, answer}"
requirements=requirements-gpu.txt
source "$(dirname "$0")/setup.sh"
MODEL=${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct} OUT=${OUT:-out/ovr_7b} NODES=${NODES:-1}
if [ "$NODES" = 1 ]; then
  where=(--standalone --nproc-per-node "${GPUS:-8}")
else # every node runs this line; the first to reach HEAD leads
  where=(--nnodes "$NODES" --nproc-per-node "${GPUS:-8}" --rdzv-backend c10d --rdzv-id ovr
    --rdzv-endpoint "${HEAD:?the name of the first node}:29500")
fi

# Stage 1 (paper, sec. 3.1 and 4.1): 5 epochs, 640 sequences a step, packs of 64k tokens, 2e-4
[ -e "$OUT/coldstart/model" ] || torchrun "${where[@]}" coldstart.py --model "$MODEL" --data "$SFT" \
  --out "$OUT/coldstart" --epochs 5 --batch 640 --pack-tokens 65536 --max-tokens 65536 \
  --lr 2e-4 --lr-end 2e-5 --warmup 0.03 --weight-decay 0.1 --recompute full \
  --valid 1024 --valid-every 250 --save-every 250 --keep-every 2500

# Stage 2 (paper, sec. 3.2 and 4.1): 512 prompts x 16 samples, 24k tokens, from step 300 on 32k, from 700 on 48k
[ -e "$OUT/rl/model" ] || torchrun "${where[@]}" rl.py --model "$OUT/coldstart/model" --data "$RL" \
  --out "$OUT/rl" --steps 900 --problems 512 --samples 16 \
  --lengths 24576 32768 49152 --length-from 0 300 700 --prompt-tokens 8192 --pack-tokens 65536 \
  --lr 1e-6 --critic-lr 5e-6 --warmup 50 --critic-steps 4 --gamma 1 --lam 1 --epsilon 0.2 \
  --sampler vllm --sampler-batch 128 --kv-cache-gb 32 --offload --recompute full \
  --save-every 20 --keep-every 100 --dump-minutes 120

# The final model (paper, sec. 4.1): the average of several checkpoints. Which ones, it does not say.
first=${HEAD:-$(hostname)}
[ -e "$OUT/average/model" ] || [ "$(hostname -s)" != "${first%%.*}" ] || python -m tools.average \
  --models "$OUT"/rl/checkpoints/step_000{700,800,900}/model --out "$OUT/average/model"
