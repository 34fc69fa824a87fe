#!/usr/bin/env bash
# The GPU rank's measurement in one go, under ten minutes: perf/hetero_gpu.sh [FILE for the JSON lines]
# Needs torch with CUDA, numpy, the built extension, and tqdm, psutil, gguf, safetensors; no MPI.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-hetero_gpu.jsonl}
python=${PYTHON:-python3}
"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "hetero_gpu: torch finds no CUDA device")'
"$python" -c 'import distinf.kernels._native' || { echo "hetero_gpu: build first: $python setup.py build_ext --inplace" >&2; exit 1; }
timeout 590 env PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "$python" perf/hetero_gpu.py \
    --configs perf/models/opt-6.7b.json,perf/models/opt-13b.json,perf/models/opt-30b.json --layers 4 | tee "$out"
