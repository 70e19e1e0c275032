#!/usr/bin/env bash
# Every exported model of a run on benchmarks: base, checkpoints and end of both stages, the average.
#
#   BENCHES="held_out=out/laptop/data/test.jsonl" bash runs/eval.sh out/laptop
#   HF_HUB_OFFLINE=0 BENCHES="mathvision_mini pope" bash runs/eval.sh out/one_gpu --limit 200
#   HF_HUB_OFFLINE=0 BASE=Qwen/Qwen2.5-VL-7B-Instruct GPUS=8 BENCHES="math500 mathvision pope=downloads/POPE" \
#     bash runs/eval.sh out/ovr_7b
#
# BENCHES  names of evaluation/benchmarks.py (python eval.py --list), each with =DIR where a local copy is to be
#          read and not the Hub; or NAME=FILE.jsonl, problems of one's own
# BASE     the base model of a run that has no base/model
# GPUS     processes, a GPU each where there are any (default 1)
#
# What follows the run's directory goes to eval.py, the same for all models. Scores lie in
# RUN/bench/STAGE/STEP/NAME, where STEP is `end` for a stage's last model; miniature/report.py shows the last
# models side by side, `python eval.py --table` all. Last models come first. What has its
# summary.json is left alone, so the command can be stopped and given again, also for new checkpoints.
set -euo pipefail
run=${1:?the directory of a run}; shift
: "${BENCHES:?names of evaluation/benchmarks.py, NAME=DIR or NAME=FILE.jsonl}"
if nvidia-smi -L > /dev/null 2>&1; then requirements=requirements-gpu.txt; fi  # with vLLM
source "$(dirname "$0")/setup.sh"
options=("$@") GPUS=${GPUS:-1} base=${BASE:-}
start=(python); [ "$GPUS" = 1 ] || start=(torchrun --standalone --nproc-per-node "$GPUS")

score() { # STAGE/STEP, model: on all benchmarks, but for those that are there
  local entry name place out what
  for entry in $BENCHES; do
    name=${entry%%=*} place=; [[ $entry == *=* ]] && place=${entry#*=}
    out=$run/bench/$1/$name
    [ -e "$out/summary.json" ] && continue
    case $place in
      "") what=(--bench "$name") ;;
      *.jsonl) what=(--bench "$name" --data "$place") ;;
      *) what=(--bench "$name" --place "$place") ;;
    esac
    echo "== $1 $name"
    "${start[@]}" eval.py --model "$2" "${what[@]}" --out "$out" "${options[@]}"
  done
}
same() { # two models: are their weights, to the byte? A stage that saves at its end does so twice
  local file
  for file in "$1"/*.safetensors; do cmp -s "$file" "$2/${file##*/}" || return 1; done
}

[ ! -e "$run/base/model" ] || base=$run/base/model
if [ -n "$base" ]; then score base/end "$base"; fi
for stage in coldstart rl average; do
  if [ -e "$run/$stage/model" ]; then score "$stage/end" "$run/$stage/model"; fi
done
for model in "$run"/{coldstart,rl}/checkpoints/step_*[0-9]/model; do
  [ -e "$model" ] || continue  # a pattern that nothing matches stands for itself
  step=${model%/model} stage=${model%/checkpoints/*}
  if same "$model" "$stage/model"; then echo "${step#"$run/"} is the end of its stage"; continue; fi
  score "${stage##*/}/${step##*/}" "$model"
done
[ -e "$run/bench" ] || { echo "$run has no models: it wants STAGE/model or STAGE/checkpoints/step_*/model"; exit 2; }

for stage in base coldstart rl average; do
  files=("$run/bench/$stage/end"/*/summary.json)
  if [ -e "${files[0]}" ]; then echo "== $stage"; python eval.py --table "${files[@]%/summary.json}"; fi
done
python -m miniature.report --run "$run"
