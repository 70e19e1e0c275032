#!/usr/bin/env bash
# Both stages on one GPU of 80 to 141 GB, with Qwen2.5-VL-3B and a shortened recipe. NOT YET RUN.
#
#   bash -c 'requirements=requirements-gpu.txt; source runs/setup.sh; HF_HUB_OFFLINE=0 hf download Qwen/Qwen2.5-VL-3B-Instruct'
#   SFT=rows.jsonl RL=problems.jsonl bash runs/one_gpu.sh
#
# Expected, by tools/plan.py and not measured on a GPU (3.1 B trained parameters):
#   memory    of 80 GB, 6 of them reserve: cold start 71 at 16k tokens; PPO 71; the model that waits does so in 77 GB of host
#             memory. On 141 GB: KV_CACHE_GB=60
# What is smaller than in the paper: the model, the batch (64 x 8 instead of 512 x 16), the lengths, the steps.
# --compile is not measured yet, and off. Stop it: touch $OUT/rl/stop. Hangs: kill -USR1 PID prints every thread's stack.
set -euo pipefail
: "${SFT:?the rows of the cold start: prompt, response}" "${RL:?the problems: prompt, images, answer}"
MODEL=${MODEL:-Qwen/Qwen2.5-VL-3B-Instruct} STEPS=${STEPS:-200} KV_CACHE_GB=${KV_CACHE_GB:-40} OUT=${OUT:-out/one_gpu} GPUS=1 PATIENCE=${PATIENCE:-1800}
source "$(dirname "$0")/gpu.sh"

[ -e "$OUT/coldstart/model" ] || torchrun "${where[@]}" coldstart.py --model "$MODEL" --data "$SFT" \
  --out "$OUT/coldstart" --epochs 2 --batch-rows 64 --pack-tokens 16384 --max-tokens 16384 \
  --lr 5e-5 --lr-end 5e-6 --recompute selective --save-every 200 --save-minutes 30 --keep-every 1000
ended coldstart

[ -e "$OUT/rl/model" ] || torchrun "${where[@]}" rl.py --model "$OUT/coldstart/model" --data "$RL" \
  --out "$OUT/rl" --steps "$STEPS" --problems 64 --samples 8 --lengths 0 4096 100 8192 \
  --prompt-tokens 4096 --pack-tokens 16384 --lr 1e-6 --critic-lr 5e-6 --warmup 20 \
  --sampler vllm --sampler-batch 256 --kv-cache-gb "$KV_CACHE_GB" --offload --recompute selective \
  --save-every 20 --save-minutes 30 --keep-every 20
ended rl

[ -e "$OUT/average/model" ] || [ "$STEPS" -lt 200 ] || python -m tools.average \
  --models "$OUT"/rl/checkpoints/step_000{160,180,200}/model --out "$OUT/average/model"
