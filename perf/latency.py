"""Time to first token and time per output token, beside what the machine's memory and arithmetic allow.

    python perf/latency.py --load-format dummy --config perf/models/lab-1b.json --input-len 128 --output-len 64
    launch/mpirun.sh -n 2 -- python perf/latency.py --model smollm2-135m --batch 8

Prints a table, then one JSON line. The end of a text is ignored; the first run warms up and is not counted;
the read bandwidth is measured before and after each run and the arithmetic peak at the end, by the same threads on the
same cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distinf.cli import add_model_arguments, load_llm, run_ranks
from distinf.comm import Group, InputError
from distinf.llm import LLM, peak_rss_mb
from distinf.sampling import SamplingParams
from distinf.stats import decode_rates, measure_read_gb_s, percentiles, token_gaps_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--batch", type=int, default=1, help="sequences at once (default: %(default)s)")
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=64, help="new tokens (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="counted runs (default: %(default)s)")
    parser.set_defaults(run=measure)
    run_ranks(parser)


def measure(args: argparse.Namespace, group: Group) -> None:
    """Load, time, and report; on every rank."""
    for flag in ("batch", "input_len", "output_len", "runs"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected 1 or more")
    llm = load_llm(args, group, args.batch * (args.input_len + args.output_len))
    # Any ids do: what they mean does not change the time. Different ones for each sequence.
    vocab = llm.config.vocab
    prompts = [[(7919 * i + 31 * b) % vocab for i in range(args.input_len)] for b in range(args.batch)]
    params = SamplingParams(max_new_tokens=args.output_len, ignore_eos=True)
    llm.generate(prompts, params)
    rss = group.all_gather_object(round(peak_rss_mb(), 1))  # before the probe has its own memory
    runs = [one_run(llm, prompts, params) for _ in range(args.runs)]
    result = report(args, llm, runs, rss)
    if group.rank == 0:
        print(table(result))
        print(json.dumps(result), flush=True)


@dataclass(frozen=True)
class Run:
    """One timed run, and what the memory gave right before and after it."""

    ttft_ms: float
    tpot_ms: list[float]
    replay_ms: list[float]  # the part of each token that the captured step takes; the rest is the host's
    ceiling_gb_s: float


def one_run(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> Run:
    """All sequences of a batch step together: the first one's times are everyone's. Collective."""
    kernels, group = llm.loaded.kernels, llm.group
    before = measure_read_gb_s(kernels, group)
    times_s = llm.generate(prompts, params)[0].token_times_s
    after = measure_read_gb_s(kernels, group)
    replay_ms = [1e3 * s for s in llm.engine.replay_s]
    return Run(1e3 * times_s[0], token_gaps_ms(times_s), replay_ms, (before + after) / 2)


def report(args: argparse.Namespace, llm: LLM, runs: list[Run], rss: list[float]) -> dict[str, Any]:
    """The JSON line; collective. The roofline fraction is the median over runs of each run's own."""
    group, kernels, weights = llm.group, llm.loaded.kernels, llm.loaded.weights
    peak = sum(group.all_gather_object(kernels.measure_peak_tops(int8=llm.run.dtype == "w8a8")))
    weight_bytes = sum(group.all_gather_object(weights.bytes_per_token))
    flops = sum(group.all_gather_object(weights.gemm_flops(args.batch * args.input_len, args.batch)))
    ttft = percentiles([run.ttft_ms for run in runs])
    tpot = percentiles([gap for run in runs for gap in run.tpot_ms])
    replay = percentiles([ms for run in runs for ms in run.replay_ms])
    rates = [decode_rates(weight_bytes, percentiles(run.tpot_ms).get("p50"), run.ceiling_gb_s) for run in runs]
    tflops = flops / ttft["p50"] / 1e9
    amx = kernels.isa == "amx"
    return {
        "model": Path(args.config).stem if args.config else args.model,
        "dtype": llm.run.dtype,
        "batch": args.batch,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "world_size": group.world_size,
        "threads": kernels.threads,
        "isa": kernels.isa,
        "kernels": kernels.name,
        "comm": group.name,
        "ttft_ms": ttft,
        "tpot_ms": tpot,
        "prefill_tok_s": round(1e3 * args.batch * args.input_len / ttft["p50"], 1),
        "decode_tok_s": round(1e3 * args.batch / tpot["p50"], 2) if tpot else None,
        "host_fraction": round(1 - replay["p50"] / tpot["p50"], 4) if replay else None,
        "weight_bytes_per_token": weight_bytes,
        **{key: median([r[key] for r in rates]) for key in rates[0]},
        "roofline_of_each_run": [r["roofline"] for r in rates],
        "prefill_tflops": round(tflops, 4),
        "peak_tflops": round(peak, 4),
        "peak_fraction": round(tflops / peak, 4),
        "amx_peak_tflops": round(peak, 4) if amx else None,
        "amx_fraction": round(tflops / peak, 4) if amx else None,
        "load_s": round(llm.load_s, 3),
        "peak_rss_mb": rss,
    }


def median(values: list[float | None]) -> float | None:
    """Of the numbers, if there are any."""
    numbers = [v for v in values if v is not None]
    return round(statistics.median(numbers), 4) if numbers else None


def table(r: dict[str, Any]) -> str:
    """The figures for a person."""
    rows = [
        ("model", f"{r['model']} {r['dtype']}, batch {r['batch']}, {r['input_len']} in / {r['output_len']} out"),
        ("ranks x threads", f"{r['world_size']} x {r['threads']}, {r['kernels']} {r['isa']}, {r['comm']}"),
        ("TTFT ms", "  ".join(f"{k} {v:.2f}" for k, v in r["ttft_ms"].items())),
        ("TPOT ms", "  ".join(f"{k} {v:.2f}" for k, v in r["tpot_ms"].items())),
        ("prefill", f"{r['prefill_tok_s']} tok/s, {r['prefill_tflops']:.3f} TFLOP/s = "
                    f"{r['peak_fraction']:.2f} of the {r['isa']} peak {r['peak_tflops']:.3f}"),
    ]  # fmt: skip
    if r["tpot_ms"]:
        rows.append(
            ("decode", f"{r['decode_tok_s']} tok/s, {r['read_gb_s']} GB/s = "
                       f"{r['roofline']:.2f} of the measured {r['roofline_read_gb_s']} GB/s")
        )  # fmt: skip
    if r["host_fraction"] is not None:
        rows.append(("host", f"{100 * r['host_fraction']:.1f} % of a token outside the captured step"))
    rows += [("load", f"{r['load_s']} s"), ("peak memory", f"{r['peak_rss_mb']} MB")]
    return "\n".join(f"{name:<16} {text}" for name, text in rows)


if __name__ == "__main__":
    main()
