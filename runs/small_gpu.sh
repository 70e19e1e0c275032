#!/usr/bin/env bash
# Both stages on one GPU of 24 GB (RTX 4090), with Qwen2.5-VL-3B, LoRA and GRPO. NOT YET RUN ON A GPU.
#
#   bash -c 'requirements=requirements-gpu.txt; source runs/setup.sh; HF_HUB_OFFLINE=0 hf download Qwen/Qwen2.5-VL-3B-Instruct'
#   SFT=rows.jsonl RL=problems.jsonl bash runs/small_gpu.sh
#
# Expected, by tools/plan.py and not measured:
#   memory    of 24 GB: cold start 19.7, GRPO 21.8 (while the engine gets its weights), 4 of them reserve in place of the
#             plan's 6: one GPU has no NCCL buffers; 8 GB of host memory
#   time      GRPO 6.5 minutes a step of 16 x 8 responses of 2,000 tokens, 22 hours in all; cold start 1.3 minutes a
#             step of 64 rows of 4,000 tokens
# python -m tools.plan --model 3b --gpus 1 --gpu rtx4090 --algorithm grpo --lora-rank 32 --pack-tokens 6144 --mean 2000 \
#   --kv-cache-gb 1.5 --sampler-batch 32 --batch 128 --steps "$STEPS" --offload --reserve-gb 4
# What is smaller than in runs/one_gpu.sh: what trains (adapters of rank 32, 60 M weights, on a frozen decoder in bfloat16;
# hence ten times the learning rates), no critic, the batch (16 x 8), the lengths. The engine gets the adapters merged in
# bfloat16, which rounds what the trainer computes exactly; --tis 2 weighs that out, logp_diff shows it.
# Stop it: touch $OUT/rl/stop. Hangs: kill -USR1 PID prints every thread's stack.
set -euo pipefail
: "${SFT:?the rows of the cold start: prompt, response}" "${RL:?the problems: prompt, images, answer}"
MODEL=${MODEL:-Qwen/Qwen2.5-VL-3B-Instruct} STEPS=${STEPS:-200} OUT=${OUT:-out/small_gpu} GPUS=1 PATIENCE=${PATIENCE:-1800}
source "$(dirname "$0")/gpu.sh"

[ -e "$OUT/coldstart/model" ] || torchrun "${where[@]}" coldstart.py --model "$MODEL" --data "$SFT" \
  --out "$OUT/coldstart" --epochs 2 --batch-rows 64 --pack-tokens 8192 --max-tokens 8192 \
  --lora-rank 64 --lr 5e-4 --lr-end 5e-5 --recompute full --save-every 200 --save-minutes 30 --keep-every 1000
ended coldstart

[ -e "$OUT/rl/model" ] || torchrun "${where[@]}" rl.py --model "$OUT/coldstart/model" --data "$RL" \
  --out "$OUT/rl" --algorithm grpo --steps "$STEPS" --problems 16 --samples 8 --lengths 0 4096 \
  --prompt-tokens 2048 --pack-tokens 6144 --lora-rank 32 --lr 1e-5 --warmup 20 --tis 2 \
  --sampler vllm --sampler-batch 32 --kv-cache-gb 1.5 --offload --recompute full \
  --save-every 20 --save-minutes 30 --keep-every 20
ended rl

[ -e "$OUT/average/model" ] || [ "$STEPS" -lt 200 ] || python -m tools.average \
  --models "$OUT"/rl/checkpoints/step_000{160,180,200}/model --out "$OUT/average/model"
