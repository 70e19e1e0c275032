#!/usr/bin/env bash
# RL alone, from a cold start that is there already: the authors' own, or any HF directory or Hub name. NOT YET RUN.
#
#   bash -c 'requirements=requirements-gpu.txt; source runs/setup.sh; HF_HUB_OFFLINE=0 hf download Kangheng/OVR-7B-ColdStart'
#   RL=problems.jsonl bash runs/from_coldstart.sh                                  # one node of 8 GPUs
#   RL=problems.jsonl TEXT=text.jsonl bash runs/from_coldstart.sh                  # and then RL on text alone
#   NODES=8 HEAD=node001 RL=... bash runs/from_coldstart.sh                        # on every node, as runs/ovr_7b.sh
#
# OVR's authors have released its cold start and its final model, OVR-7B-RL, but no data. If the Hub wants their terms accepted:
# on its page, then `hf auth login`. TEXT adds a third stage, the order of ReVisual-R1 (arXiv 2506.04207): cold start on text,
# RL on text and pictures, RL on text alone, the tower frozen. How many steps it takes is ours to choose: TEXT_STEPS.
#
# Expected, by tools/plan.py and not measured: memory and hours of RL as in runs/ovr_7b.sh, whose stage 2 this is; 300 steps
# (STEPS) take 26 days on 8 H100 at an assumed 40 % of their peak. First the doctor, as there.
set -euo pipefail
: "${RL:?the problems: prompt, images, answer}"
MODEL=${MODEL:-Kangheng/OVR-7B-ColdStart} OUT=${OUT:-out/from_coldstart} GPUS=${GPUS:-8} PATIENCE=${PATIENCE:-10800}
source "$(dirname "$0")/gpu.sh"

rl() { # name, model, problems, steps, lengths: RL with the paper's numbers, unless it is done
  [ -e "$OUT/$1/model" ] || torchrun "${where[@]}" rl.py --model "$2" --data "$3" --out "$OUT/$1" --steps "$4" \
    --lengths $5 --prompt-tokens 8192 --pack-tokens 65536 --problems 512 --samples 16 --lr 1e-6 --critic-lr 5e-6 --warmup 50 \
    --sampler vllm --sampler-batch 128 --kv-cache-gb 40 --offload --recompute full \
    --save-every 50 --save-minutes 60 --keep-every 50
  ended "$1"
}

rl rl "$MODEL" "$RL" "${STEPS:-300}" "${LENGTHS:-0 24576}"
[ -z "${TEXT:-}" ] || rl rl_text "$OUT/rl/model" "$TEXT" "${TEXT_STEPS:-100}" "${LENGTHS:-0 24576}"
