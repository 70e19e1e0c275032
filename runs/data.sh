#!/usr/bin/env bash
# Stage 0: public sets become out/data/sft.jsonl or out/data/rl.jsonl, which the stages read.
#
#   HF_HUB_OFFLINE=0 SETS="math openr1_math" URL=http://HOST:8000/v1 TEACHER=r1 LM=Qwen/Qwen2.5-0.5B bash runs/data.sh sft
#   HF_HUB_OFFLINE=0 SETS="mmk12 puzzlevqa=downloads/PuzzleVQA/data" MODEL=out/ovr_7b/coldstart/model GPUS=8 bash runs/data.sh rl
#
# SETS are names of curation/sources.py, with =DIR for a local copy (the Hub wants HF_HUB_OFFLINE=0); LOGIC problems
# made by program come on top (0: none). URL and TEACHER write responses for the rows that have none, LM finds abnormal
# losses, MODEL (the start of RL) what is never or always solved: without them that step is left out. BENCHMARKS are
# files of test questions, COUNT the rows to draw; DISTIL, SCORE and PASSES further options of these steps.
# A file that is there is not made again, so a command that was stopped is given again. Derived, not measured: traces of
# 8k tokens for 1 M problems take 100 GPU-days of R1's distilled 32B, losses of 2 M rows by a model of 0.5 B 8 GPU-hours,
# 8 tries at 300 k problems 10 days of 8 H100, the sampling of 290 steps of rl.py.
set -euo pipefail
what=${1:?sft or rl}; case $what in sft | rl) ;; *) echo "sft or rl, not $what"; exit 2 ;; esac
if nvidia-smi -L > /dev/null 2>&1; then requirements=requirements-gpu.txt; fi  # with vLLM
source "$(dirname "$0")/setup.sh"
OUT=${OUT:-out/data} LOGIC=${LOGIC:-10000}; mkdir -p "$OUT/raw"
make() { [ -e "$1" ] || { echo "== $1"; python -m "${@:2}" --out "$1"; }; }  # file, module, options
curate() { make "$1" curation.curate --workers "${WORKERS:-$(nproc)}" ${BENCHMARKS:+--benchmarks $BENCHMARKS} "${@:2}"; }

rows=() untraced=() scorer=${MODEL:-} options=(--kind passes ${PASSES:-}) column=--passes
[ "$what" = rl ] || { scorer=${LM:-} options=(--kind loss ${SCORE:-}) column=--losses; }
for set in ${SETS:?names of curation/sources.py} $([ "$LOGIC" = 0 ] || echo logic); do  # 1. read, or make
  file=$OUT/raw/${set%%=*}.jsonl place=; [[ $set != *=* ]] || place=${set#*=}
  if [ "$set" = logic ]; then make "$file" curation.logic --count "$LOGIC"
  else make "$file" curation.sources --set "${set%%=*}" ${place:+--place "$place"}; fi
  if [ "$what" = rl ] || head -n 1 "$file" | grep -q '"response":'; then rows+=("$file"); else untraced+=("$file"); fi
done
if [ -n "${URL:-}" ] && [ ${#untraced[@]} -gt 0 ]; then  # 2. distil what may stay
  curate "$OUT/problems.jsonl" --kind rl --rows "${untraced[@]}"
  make "$OUT/distilled.jsonl" curation.distil --rows "$OUT/problems.jsonl" --url "$URL" --model "${TEACHER:?}" ${DISTIL:-}
  rows+=("$OUT/distilled.jsonl")
fi
if [ -n "$scorer" ]; then  # 3. score what the rules leave
  curate "$OUT/$what.unscored.jsonl" --kind "$what" --rows "${rows[@]}"
  make "$OUT/$what.scores.jsonl" torch.distributed.run --standalone --nproc-per-node "${GPUS:-1}" -m curation.score \
    "${options[@]}" --rows "$OUT/$what.unscored.jsonl" --model "$scorer"
fi
curate "$OUT/$what.jsonl" --kind "$what" --rows "${rows[@]}" --count "${COUNT:-0}" ${scorer:+$column "$OUT/$what.scores.jsonl"}  # 4.
