#!/usr/bin/env bash
# Both stages on one GPU of 80 to 141 GB, with Qwen2.5-VL-3B and a shortened recipe. NOT YET RUN.
#
#   bash -c 'requirements=requirements-gpu.txt; source runs/setup.sh; HF_HUB_OFFLINE=0 hf download Qwen/Qwen2.5-VL-3B-Instruct'
#   SFT=rows.jsonl RL=problems.jsonl bash runs/one_gpu.sh
#
# Expected, derived by tools/plan.py and not measured (3.1 B trained parameters, 16 B of state each):
#   memory    cold start 74 of 80 GB at 16k tokens; PPO 75 while it learns, the model that waits
#             does so in 74 GB of host memory. On 141 GB: --kv-cache-gb 60 --sampler-batch 256
#   time      21k tokens/s in the cold start; a PPO step of 64 x 8 responses of 3k tokens: 1.3 min
# What is smaller than in the paper: the model, the batch (64 x 8 instead of 512 x 16), the lengths, the steps.
set -euo pipefail
: "${SFT:?the rows of the cold start: prompt, response}" "${RL:?the problems: prompt, images, answer}"
requirements=requirements-gpu.txt
source "$(dirname "$0")/setup.sh"
MODEL=${MODEL:-Qwen/Qwen2.5-VL-3B-Instruct} OUT=${OUT:-out/one_gpu}

[ -e "$OUT/coldstart/model" ] || torchrun --standalone coldstart.py --model "$MODEL" --data "$SFT" \
  --out "$OUT/coldstart" --epochs 2 --batch 64 --pack-tokens 16384 --max-tokens 16384 \
  --lr 5e-5 --lr-end 5e-6 --recompute selective --save-every 200 --keep-every 1000

[ -e "$OUT/rl/model" ] || torchrun --standalone rl.py --model "$OUT/coldstart/model" --data "$RL" \
  --out "$OUT/rl" --steps 200 --problems 64 --samples 8 --lengths 4096 8192 --length-from 0 100 \
  --prompt-tokens 4096 --pack-tokens 16384 --lr 1e-6 --critic-lr 5e-6 --warmup 20 \
  --sampler vllm --sampler-batch 128 --kv-cache-gb 7 --offload --recompute selective \
  --save-every 20 --keep-every 20

[ -e "$OUT/average/model" ] || python -m tools.average \
  --models "$OUT"/rl/checkpoints/step_000{160,180,200}/model --out "$OUT/average/model"
