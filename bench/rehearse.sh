#!/usr/bin/env bash
# The campaign's dry run in the package set of the machines that have a GPU, without one; see GPU.md.
#
#   bench/rehearse.sh [FOLDER] [PART|STAGE...]     FOLDER: of the environment, kept for the next time (default: .venv-gpu)
#
# PYTHON names a Python 3.12. Some 6 GB are downloaded at the first time. Exit code: that of the campaign.
set -euo pipefail
cd "$(dirname "$0")/.."
folder="${1:-.venv-gpu}"
[ $# -eq 0 ] || shift
# only a whole one counts: an install that broke off is gone on with
if [ ! -e "$folder/whole" ]; then
  "${PYTHON:-python3.12}" -m venv "$folder"
  "$folder/bin/pip" install -q torch==2.11.0 triton==3.6.0 transformers==5.17.0 numpy==2.5.2 peft==0.21.2 accelerate==1.15.0 \
    safetensors pyyaml rich matplotlib tensorboard jinja2 pillow pytest pytest-benchmark pytest-xdist pytest-timeout hypothesis \
    pybind11 ninja setuptools wheel
  touch "$folder/whole"
  echo "environment made after $SECONDS s"
fi
export CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}" TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}"
# minutes on few cores: the stages' limit is not for that
export QWEN_FUSED_REQUIRE_EXTENSION=1
if ! "$folder/bin/python" -c "import torch, qwen_fused._C" 2>/dev/null; then
  "$folder/bin/python" setup.py -q build_ext --inplace
  echo "extension built after $SECONDS s"
fi
# code is tried, not speed: a busy machine must not end a stage, and threads that wait for one another are slow there
export LIMIT="${LIMIT:-1800}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
PYTHON="$folder/bin/python" exec bash bench/gpu_campaign.sh --cpu "$@"
