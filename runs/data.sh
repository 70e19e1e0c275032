#!/usr/bin/env bash
# Stage 0: public sets become the two files that the stages read, each with a page about it.
#
#   SETS="math numinamath openr1_math" URL=http://HOST:8000/v1 TEACHER=deepseek-r1 LM=Qwen/Qwen2.5-0.5B \
#     BENCHMARKS="out/bench/*/items.jsonl" bash runs/data.sh sft       # out/data/sft.jsonl, out/data/sft.card.html
#   SETS="geometry3k puzzlevqa=downloads/PuzzleVQA/data mmk12" MODEL=out/coldstart/model \
#     BENCHMARKS="out/bench/*/items.jsonl" bash runs/data.sh rl        # out/data/rl.jsonl, out/data/rl.card.html
#
# SETS        names of curation/sources.py, each with =DIR where a local copy is to be read and not the Hub, which
#             wants HF_HUB_OFFLINE=0
# LOGIC       problems made by program, beside the sets (default 10000; 0: none)
# URL TEACHER an OpenAI-compatible server and its model, for responses; without them, rows that bring a
#             response (openr1_math) are all there is
# LM          a small pretrained language model for the loss filter; without it, no filter
# MODEL       the model that RL will start from, for pass rates; without it, no filter
# BENCHMARKS  test questions that must not be in the data: what evaluation/benchmarks.py or eval.py wrote
# COUNT       rows to draw at the end (0: all)
# DISTIL SCORE PASSES  further options of curation/distil.py, curation/score.py --kind loss, curation/score.py --kind passes
#
# Time, derived and not measured: 2 M rows take 50 core-minutes in curation/curate.py (three times); responses of 8k
# tokens for 1 M problems are 8 G tokens, 100 GPU-days of R1's distilled 32B at 1k tokens/s and GPU; losses
# of 2 M rows by a model of 0.5 B 3 GPU-hours; pass rates of 300 k problems x 8 the sampling of 290 steps of rl.py.
# Every step is left alone if its file is there, so the command can be stopped and given again.
set -euo pipefail
what=${1:?sft or rl}
source "$(dirname "$0")/setup.sh"
OUT=${OUT:-out/data} LOGIC=${LOGIC:-10000} WORKERS=${WORKERS:-$(nproc)} GPUS=${GPUS:-1} BENCHMARKS=${BENCHMARKS:-} COUNT=${COUNT:-0}
case $what in sft | rl) ;; *) echo "sft or rl, not $what"; exit 2 ;; esac
mkdir -p "$OUT/raw"
tests=(${BENCHMARKS:+--benchmarks $BENCHMARKS})  # unquoted: patterns become files

raw=()
for set in ${SETS:?names of curation/sources.py}; do  # 1. read
  name=${set%%=*} place=; [[ $set == *=* ]] && place=${set#*=}
  file=$OUT/raw/$name.jsonl
  [ -e "$file" ] || { echo "== read $name"; python -m curation.sources --set "$name" ${place:+--place "$place"} --out "$file"; }
  raw+=("$file")
done
if [ "$LOGIC" -gt 0 ]; then
  [ -e "$OUT/raw/logic.jsonl" ] || { echo "== logic"; python -m curation.logic --count "$LOGIC" --out "$OUT/raw/logic.jsonl"; }
  raw+=("$OUT/raw/logic.jsonl")
fi

curate() { # kind, out, further options: unless it is there
  [ -e "$2" ] || { echo "== curate $2"; python -m curation.curate --kind "$1" --out "$2" --workers "$WORKERS" "${tests[@]}" "${@:3}"; }
}
if [ "$what" = sft ]; then
  traced=() untraced=()  # does the first row bring a response?
  for file in "${raw[@]}"; do
    if head -n 1 "$file" | grep -q '"response":'; then traced+=("$file"); else untraced+=("$file"); fi
  done
  if [ -n "${URL:-}" ] && [ ${#untraced[@]} -gt 0 ]; then  # 2. distil, only what may stay
    curate rl "$OUT/problems.jsonl" --rows "${untraced[@]}"
    [ -e "$OUT/distilled.jsonl" ] || { echo "== distil"; python -m curation.distil --rows "$OUT/problems.jsonl" \
      --url "$URL" --model "${TEACHER:?the name of the model at $URL}" --out "$OUT/distilled.jsonl" ${DISTIL:-}; }
    traced+=("$OUT/distilled.jsonl")
  fi
  rows=("${traced[@]}") kind=loss scorer=${LM:-} extra=${SCORE:-}
else
  rows=("${raw[@]}") kind=passes scorer=${MODEL:-} extra=${PASSES:-}
fi
scores=()
if [ -n "$scorer" ]; then  # 3. score, only what the rules leave
  curate "$what" "$OUT/$what.unscored.jsonl" --rows "${rows[@]}"
  [ -e "$OUT/$what.scores.jsonl" ] || { echo "== score"; torchrun --standalone --nproc-per-node "$GPUS" -m curation.score \
    --kind $kind --rows "$OUT/$what.unscored.jsonl" --model "$scorer" --out "$OUT/$what.scores.jsonl" $extra; }
  [ $kind = loss ] && scores=(--losses "$OUT/$what.scores.jsonl") || scores=(--passes "$OUT/$what.scores.jsonl")
fi
curate "$what" "$OUT/$what.jsonl" --rows "${rows[@]}" "${scores[@]}" --count "$COUNT"  # 4. curate
python -m curation.card --rows "$OUT/$what.jsonl"  # 5. the page
