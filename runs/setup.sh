# Makes .venv (Python 3.11 or 3.12) with the pinned requirements, once; later calls only activate it.
# Sourced by the other scripts: [requirements=requirements-gpu.txt] source runs/setup.sh
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=${requirements:-requirements.txt}
if ! cmp -s <(cat requirements.txt "$requirements") ".venv/$requirements"; then
  if [ ! -x .venv/bin/python ]; then
    python=$(command -v python3.11 || command -v python3.12) || { echo "Python 3.11 or 3.12 is needed"; exit 1; }
    echo "setting up .venv with $("$python" --version) ..."
    "$python" -m venv .venv
  fi
  .venv/bin/pip install --quiet --disable-pip-version-check -r "$requirements"
  cat requirements.txt "$requirements" > ".venv/$requirements"
fi
source .venv/bin/activate
export OMP_WAIT_POLICY=PASSIVE  # idle threads sleep: several times faster on a busy machine
export MKL_CBWR=AUTO,STRICT     # the same bits in every run: see common/distributed.py
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
