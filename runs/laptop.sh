#!/usr/bin/env bash
# The whole method in miniature, from nothing: a base model, the cold start on text, RL on text and
# pictures, the average of checkpoints, every stage measured on held-out bills, a report at the end.
#
#   bash runs/laptop.sh                       # seed 0 into out/laptop
#   bash runs/laptop.sh --controls            # also six controls, see below
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

rows() { # directory, the file that is written last, options: its data, unless it is there
  [ -e "$out/$1/$2.jsonl" ] || python -m miniature.world --out "$out/$1" --seed "$seed" "${@:3}"
}
stage() { # name, script and arguments: runs unless the stage has its model
  local name=$1; shift
  [ -e "$out/$name/model" ] && return
  echo "== $name"
  OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node "$ranks" "$@" --out "$out/$name" --seed "$seed"
  [ -e "$out/$name/model" ] || exit  # stopped by hand: the same command goes on
}
answers() { # stage, name, options: its replies to the held-out bills, unless they are there
  [ -e "$out/eval/$1/$2/summary.json" ] && return
  OMP_NUM_THREADS=1 python eval.py --sampler torch --model "$out/$1/model" --data "$out/data/test.jsonl" --bench test \
    --max-tokens 96 --out "$out/eval/$1/$2" "${@:3}"
}
measure() { # stage: its likeliest replies, sampled ones, and what it can do
  echo "== measure $1"
  answers "$1" greedy &
  answers "$1" sampled --temperature 1
  wait $!
  [ -e "$out/eval/$1/skills.json" ] ||
    python -m miniature.base --measure "$out/$1/model" > "$out/eval/$1/skills.json"
}

rows data traces &
stage base -m miniature.base
wait $!
measure base
stage coldstart coldstart.py --model "$out/base/model" --data "$out/data/sft.jsonl"
measure coldstart
stage rl rl.py --model "$out/coldstart/model" --data "$out/data/train.jsonl"
measure rl
# is the second look the cause? The same model, but it may not say `again`, or `wait`
answers rl forbid_again --forbid again &
answers rl forbid_wait --forbid wait
wait $!
if [ ! -e "$out/average/model" ]; then
  python -m tools.average --models $(ls -d "$out"/rl/checkpoints/*/model | tail -n 3) --out "$out/average/model"
fi
measure average

if [ -n "$controls" ]; then
  control() { # name, model, data, options: RL under one other condition
    stage "$1" rl.py --model "$out/$2/model" --data "$out/$3/train.jsonl" --save-every 0 "${@:4}"
    measure "$1"
  }
  control rl_without_coldstart base data
  rows data_random_total train --files train --control random_total  # T says nothing: no check pays
  control rl_random_total coldstart data_random_total
  rows data_no_smudged train --files train --control no_smudged      # one look is always enough
  control rl_no_smudged coldstart data_no_smudged
  control rl_grpo coldstart data --algorithm grpo
  # the reasoning is all in text anyway; here nothing keeps the model seeing
  stage coldstart_text_only coldstart.py --model "$out/base/model" --data "$out/data/traces.jsonl"
  measure coldstart_text_only
  control rl_text_only coldstart_text_only data
fi
python -m miniature.report --run "$out"
