#!/usr/bin/env bash
# What a GPU beside the CPU gives, in one go, ended after ten minutes: perf/hetero_gpu.sh [FLAGS of perf/hetero_gpu.py]
# Needs torch with CUDA, numpy, psutil, tqdm and the built extension; no MPI, no checkpoint. Not yet run on a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "hetero_gpu: torch finds no CUDA device")'
"$python" -c 'import distinf.kernels._native' ||
    { echo "hetero_gpu: build first: $python setup.py build_ext --inplace" >&2; exit 1; }
exec timeout 590 env PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "$python" perf/hetero_gpu.py "$@"
