#!/usr/bin/env bash
# The paper's recipe at full size: Qwen2.5-VL-7B, one node of 8 GPUs or several. NOT YET RUN: it has
# been tested with small models on CPUs, part by part; no machine of several GPUs was at hand.
#
#   SFT=rows.jsonl RL=problems.jsonl bash runs/ovr_7b.sh                           # one node
#   NODES=8 HEAD=node001 SFT=... RL=... bash runs/ovr_7b.sh                        # on every node
#   export SFT RL NODES=8 HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)    # under Slurm
#   srun --nodes 8 --ntasks-per-node 1 --gpus-per-node 8 --kill-on-bad-exit=1 bash runs/ovr_7b.sh
# Without RL it ends after the cold start, whose pass rates choose the problems (runs/data.sh rl).
#
# First, on one node, where the Hub can be reached (a checkout that several nodes share is set up once):
#   bash -c 'requirements=requirements-gpu.txt; source runs/setup.sh; HF_HUB_OFFLINE=0 hf download Qwen/Qwen2.5-VL-7B-Instruct'
# Where nodes have several networks: export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 (or what yours is called)
# Every path must be seen by all nodes. Give the same command again after a failure: finished stages
# are kept, an unfinished one goes on from its newest checkpoint, also on another number of GPUs.
#
# Expected, by tools/plan.py and not measured on GPUs (7.6 B parameters trained, 24k to 48k tokens a response):
#   memory    of 80 GB a GPU on 8, 6 of them reserve: cold start 61; PPO 61 while it trains, 73 while weights go over to the
#             engine; 198 GB of host memory a node for the models that wait
#   time      on 8 H100 at an assumed 40 % of their peak: a step of the cold start, 640 packs, 14 min, 1,060 steps 10.5 days;
#             a PPO step of 8,192 responses 124 min, 52 of them sampling, 900 steps 78 days; an eighth of all that on 64. With
#             the long tail, simulated (docs/speed.md): 90 days of RL on 8 GPUs, 17 on 64. Responses of 10k tokens on average
#   disk      1.1 TB: models of 17 GB in bfloat16; states of 180 GB in RL, two are kept and a third is written; of 93 GB in the
#             cold start, whose checkpoints/*/state may go when it is done
# Before it: python -m tools.plan --model 7b --gpus 8 --gpu h100 --offload --kv-cache-gb 40, and on all GPUs
#   torchrun --nproc-per-node 8 -m tools.doctor rl --model DIR --data RL.jsonl --lr 1e-6 --out out/ovr_7b/rl --recompute full
#   (before the cold start: doctor coldstart --model Qwen/... --data SFT.jsonl). --compile is not measured yet, and off.
# A smoke test of these settings, of an epoch or five over a few hundred rows and two small steps of RL:
#   STEPS=2 PROBLEMS=16 PACKS=8 VALID=16 OUT=out/smoke SFT=... RL=... bash runs/ovr_7b.sh
# Watch it: tail -f $OUT/rl/metrics.jsonl ($OUT/coldstart before). Hangs: kill -USR1 PID prints every thread's stack.
# Stop it: touch $OUT/rl/stop, or $OUT/coldstart/stop (Ctrl-C and SIGTERM ask the same: torchrun then waits $PATIENCE seconds for the checkpoint).
set -euo pipefail
: "${SFT:?the rows of the cold start: prompt, response}"
for rows in "$SFT" "${RL:-}"; do  # not after ten days
  case $rows in *.jsonl | *.parquet) [ -e "$rows" ] || { echo "$rows is not there"; exit 2; } ;; esac
done
MODEL=${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct} STEPS=${STEPS:-900} PROBLEMS=${PROBLEMS:-512} PACKS=${PACKS:-640} VALID=${VALID:-1024} OUT=${OUT:-out/ovr_7b} GPUS=${GPUS:-8} PATIENCE=${PATIENCE:-10800}
source "$(dirname "$0")/gpu.sh"

# Stage 1 (paper, sec. 3.1 and 4.1): 5 epochs, 640 packs of 64k tokens a step, 2e-4
[ -e "$OUT/coldstart/model" ] || torchrun "${where[@]}" coldstart.py --model "$MODEL" --data "$SFT" \
  --out "$OUT/coldstart" --epochs 5 --batch-packs "$PACKS" --batch-rows 0 --pack-tokens 65536 --max-tokens 65536 \
  --lr 2e-4 --lr-end 2e-5 --warmup 0.03 --weight-decay 0.1 --recompute full \
  --valid "$VALID" --valid-every 20 --save-every 200 --save-minutes 60 --keep-every 200
ended coldstart
[ -n "${RL:-}" ] || { echo "the cold start is done; the same command with RL=problems.jsonl goes on"; exit; }

# Stage 2 (paper, sec. 3.2 and 4.1): 512 prompts x 16 samples, 24k tokens, from step 300 on 32k, from 700 on 48k
[ -e "$OUT/rl/model" ] || torchrun "${where[@]}" rl.py --model "$OUT/coldstart/model" --data "$RL" \
  --out "$OUT/rl" --algorithm ppo --steps "$STEPS" --problems "$PROBLEMS" --samples 16 --policy-steps 1 --critic-steps 4 \
  --lengths 0 24576 300 32768 700 49152 --prompt-tokens 8192 --pack-tokens 65536 \
  --lr 1e-6 --critic-lr 5e-6 --warmup 50 --lam 1 --epsilon 0.2 \
  --sampler vllm --sampler-batch 128 --kv-cache-gb 40 --offload --recompute full \
  --save-every 100 --save-minutes 60 --keep-every 100
ended rl

# The final model (paper, sec. 4.1): the average of several checkpoints. Which ones, it does not say.
# The first node makes it: the one that HEAD names, or whose address HEAD is.
first=${HEAD:-$(hostname)}
if [ ! -e "$OUT/average/model" ] && [ "$STEPS" -ge 900 ] && [[ " $(hostname) $(hostname -s) $(hostname -f 2>/dev/null) $(hostname -I 2>/dev/null) " == *" $first "* ]]; then
  python -m tools.average --models "$OUT"/rl/checkpoints/step_000{700,800,900}/model --out "$OUT/average/model"
elif [ ! -e "$OUT/average/model" ]; then
  echo "no average was made here: python -m tools.average --models $OUT/rl/checkpoints/step_*/model --out $OUT/average/model"
fi
