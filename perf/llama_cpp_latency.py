"""What perf/latency.py measures, of llama.cpp: one JSON line for perf/beside_llama_cpp.py, which starts this.

Runs in any Python environment with `pip install llama-cpp-python`; nothing of distinf is imported.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import statistics
import time

import llama_cpp as api
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="GGUF")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--input-len", type=int, required=True)
    parser.add_argument("--output-len", type=int, required=True)
    parser.add_argument("--runs", type=int, required=True)
    args = parser.parse_args()

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # the cores that ours takes
    model = Model(args.model, args.threads, args.input_len + args.output_len)
    prompt = [7919 * i % model.vocab for i in range(args.input_len)]
    model.token_times_s(prompt, args.output_len)  # the first run is not counted
    runs = [model.token_times_s(prompt, args.output_len) for _ in range(args.runs)]
    gaps = [b - a for times in runs for a, b in itertools.pairwise(times)]
    result = {
        "version": api.__version__,
        "system": api.llama_print_system_info().decode().strip(),
        "ttft_ms": 1e3 * statistics.median(times[0] for times in runs),
        "tpot_ms": 1e3 * statistics.median(gaps),
    }
    print(json.dumps(result), flush=True)


class Model:
    """A model and its context, through llama.cpp's C functions: Python's part of a token is one argmax."""

    def __init__(self, path: str, threads: int, tokens: int) -> None:
        self._log = api.llama_log_callback(lambda level, text, data: None)  # kept: C calls it
        api.llama_log_set(self._log, None)
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        how = api.llama_context_default_params()
        how.n_ctx = how.n_batch = tokens
        how.n_threads = how.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, how)
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))

    def token_times_s(self, prompt: list[int], new_tokens: int) -> list[float]:
        """Seconds from the prompt to each of its greedy tokens."""
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        start, times, tokens = time.perf_counter(), [], prompt
        while len(times) < new_tokens:
            ids = (ctypes.c_int32 * len(tokens))(*tokens)  # the batch points there
            if api.llama_decode(self._context, api.llama_batch_get_one(ids, len(tokens))) != 0:
                raise SystemExit("llama_decode failed")
            logits = np.ctypeslib.as_array(api.llama_get_logits_ith(self._context, -1), (self.vocab,))
            tokens = [int(logits.argmax())]
            times.append(time.perf_counter() - start)
        return times


if __name__ == "__main__":
    main()
