#!/usr/bin/env bash
# The whole method in miniature, from nothing: a base model, the cold start on text, RL on text and
# pictures, the average of checkpoints, every stage measured on held-out problems, a report at the end.
#
#   bash runs/laptop.sh                       # seed 0 into out/laptop
#   bash runs/laptop.sh --controls            # also: RL without cold start, GRPO, no captions
#   bash runs/laptop.sh --seed 1 --out out/seed1
#   bash runs/laptop.sh --ranks 1             # one process a stage; default 2, the same numbers
#
# Stages that are finished are kept: the command can be stopped and given again.
set -euo pipefail
out=out/laptop seed=0 controls= ranks=2
while [ $# -gt 0 ]; do
  case $1 in
    --controls) controls=1; shift ;;
    --seed) seed=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --ranks) ranks=$2; shift 2 ;;
    *) echo "unknown option $1; there are --controls, --seed N, --out DIR, --ranks N"; exit 2 ;;
  esac
done
source "$(dirname "$0")/setup.sh"

stage() { # name, script and arguments: runs unless the stage has its model
  local name=$1; shift
  [ -e "$out/$name/model" ] && return
  echo "== $name"
  OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node "$ranks" "$@" --out "$out/$name" --seed "$seed"
  [ -e "$out/$name/model" ] || exit  # stopped by hand: the same command goes on
}
measure() { # name: greedy and sampled answers to held-out problems, and plain reading
  local model="$out/$1/model" eval="$out/eval/$1"
  [ -e "$eval/greedy/summary.json" ] && [ -e "$eval/reading/summary.json" ] && return
  echo "== measure $1"
  ask() { python eval.py --threads 1 --model "$model" --data "$out/data/$1.jsonl" --bench "$1" --out "$eval/$2" "${@:3}"; }
  { ask test greedy && ask reading reading; } &
  ask test sampled --k 2 --temperature 1
  wait $!
}

echo "== base"
python -m miniature.world --out "$out" --seed "$seed"
measure base
# the reasoning is all in text; captions of pictures and grids, without reasoning, keep the model seeing
stage coldstart coldstart.py --model "$out/base/model" --data "$out/data/sft.jsonl" --replay "$out/data/sft_replay.jsonl"
measure coldstart
stage rl rl.py --model "$out/coldstart/model" --data "$out/data/train.jsonl"
measure rl
if [ ! -e "$out/average/model" ]; then
  python -m tools.average --models $(ls -d "$out"/rl/checkpoints/*/model | tail -n 3) --out "$out/average/model"
fi
measure average

if [ -n "$controls" ]; then
  stage rl_without_coldstart rl.py --model "$out/base/model" --data "$out/data/train.jsonl"
  measure rl_without_coldstart
  stage rl_grpo rl.py --model "$out/coldstart/model" --data "$out/data/train.jsonl" --algorithm grpo
  measure rl_grpo
  stage coldstart_text_only coldstart.py --model "$out/base/model" --data "$out/data/sft.jsonl"
  measure coldstart_text_only
  stage rl_text_only rl.py --model "$out/coldstart_text_only/model" --data "$out/data/train.jsonl"
  measure rl_text_only
fi
python -m miniature.report --run "$out"
