#!/usr/bin/env bash
# Serves an exported model with vLLM, behind OpenAI's interface, on GPUs or on a CPU.
#
#   bash runs/serve.sh out/laptop/rl/model          # http://127.0.0.1:8000/v1; Ctrl-C ends it
#   bash runs/serve.sh out/ovr_7b/average/model 8001 --data-parallel-size 8     # and options of `vllm serve`
#   python -m tools.ask --url http://127.0.0.1:8000/v1 --image picture.png "How many apples are there?"
#
# NAME   what clients call the model (default ovr)
# HOST   127.0.0.1, this machine alone, by default; 0.0.0.0 for all, and then behind a firewall
#
# On GPUs (NOT YET RUN there) it sets up .venv with requirements-gpu.txt; on a CPU it wants .venv-vllm, which
# runs/test.sh makes.
# From a program of one's own:
#
#   import base64, openai
#   client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
#   picture = base64.b64encode(open("picture.png", "rb").read()).decode()
#   content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
#              {"type": "text", "text": "How many apples are there?"}]
#   reply = client.chat.completions.create(model="ovr", messages=[{"role": "user", "content": content}])
#   print(reply.choices[0].message.content)
set -euo pipefail
model=${1:?the directory of a model, as out/laptop/rl/model}; shift
port=8000; if [[ ${1:-} =~ ^[0-9]+$ ]]; then port=$1; shift; fi
if [ -d "$model" ]; then model=$(realpath "$model"); fi
if nvidia-smi -L >/dev/null 2>&1; then
  requirements=requirements-gpu.txt
  source "$(dirname "$0")/setup.sh"
  python=python device=()
else
  source "$(dirname "$0")/setup.sh"
  python=.venv-vllm/bin/python
  why=$(cat .venv-vllm/why.txt 2>/dev/null || echo "bash runs/test.sh tests/test_vllm.py makes .venv-vllm")
  [ -z "$why" ] || { echo "no GPU, and no vLLM for CPUs: $why"; exit 1; }
  export PYTHONPATH=$PWD/tests/vllm_cpu${PYTHONPATH:+:$PYTHONPATH}  # so that torchvision can be imported
  export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}   # GB; left to itself, most of the memory
  device=(--dtype float32 --enforce-eager)  # as it was trained; to compile takes half a minute
fi
export VLLM_NO_USAGE_STATS=1
# the tokens of prompt and response that it was trained on, where its card says so
context=$(grep -om 1 -e '--max-model-len [0-9]*' "$model/README.md" 2>/dev/null || true)
# The module behind `vllm serve`: that command asks for a package named vllm, and vllm-cpu is another.
# Sampling settings are a client's own: generation_config.json is the base model's, with its penalty.
exec $python -m vllm.entrypoints.launchers.api_server.entry --model "$model" \
  --served-model-name "${NAME:-ovr}" --host "${HOST:-127.0.0.1}" --port "$port" \
  --generation-config vllm $context "${device[@]}" "$@"
