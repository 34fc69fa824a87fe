"""Our matrix multiplication beside torch's (oneDNN's) bf16 `linear`, over the shapes of a model.

    python perf/gemm.py --config perf/models/lab-1b.json --dtypes bf16,int8
    python perf/gemm.py --config perf/models/qwen2-72b.json --tp 8 --rows 1,16,1024 --isa avx512

Every contender, one for each dtype and one for torch, is a process of its own with the same number of threads,
pinned to the same cores: neither can disturb the other's thread pool, and only one of them works at a time. They
take turns, A B A B, and each turn goes through all the linears of a model (--num-layers of them, and the head) in
order, timing each: when a weight's turn comes again, more than four times the last-level cache has gone by.
At --rows of 128 and more, where weights are reused and a turn is long, two layers and the head are enough.
Outputs are bf16, without bias; with gate_up, ours makes silu(gate) * up of its sums, and torch does not. Freed memory
stays in the process, so no output is written to fresh pages.

--isa caps both: ours is forced to it, and oneDNN gets ONEDNN_MAX_CPU_ISA. What ran is reported: the instruction
set of ours, oneDNN's implementation (or that torch did not use oneDNN), and the cores that were busy.

Prints a table of medians (GB/s are of weights; `read` and `peak` are shares of the read bandwidth and of the bf16
peak, in w8a8 the int8 peak, that our kernels measure in this run; `ratio` is torch's time over ours), then one
JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from gemm_contenders import MANY_ROWS, Contender, Ours, Torch

from distinf.binding import allowed_cores
from distinf.cli import add_model_arguments, run_ranks
from distinf.comm import Group, InputError
from distinf.kernels import extension
from distinf.models import family
from distinf.weights.hf_config import read_config_json

LAB = Path(__file__).parent / "models/lab-1b.json"
CAPS = {
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "amx": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"},
}
# glibc: big blocks from the heap, and the heap is kept. Fresh pages for each output would be timed otherwise.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--dtypes", metavar="D,D,...", help="weights of ours, one after the other (default: --dtype)")
    parser.add_argument("--rows", default="1,4,8,16,32,128,512,2048", help="(default: %(default)s)")
    parser.add_argument("--tp", type=int, default=1, help="shapes of one of so many ranks (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (default: %(default)s)")
    parser.set_defaults(run=measure, load_format="dummy", config=str(LAB))
    run_ranks(parser)


def measure(args: argparse.Namespace, group: Group) -> None:
    """Start the contenders, let them take turns, and report."""
    rows, cores = checked(args, group)
    dtypes = (args.dtypes or args.dtype).split(",")
    args.num_layers = args.num_layers or layers_past_the_cache(args)
    plain = {name: value for name, value in vars(args).items() if name != "run"}
    capped = KEEP_MEMORY | torch_environment(args.isa, cores)
    with ExitStack() as stack:

        def start(name: str, kind: Callable[[Any], object], argument: object, variables: dict[str, str]) -> Contender:
            return stack.enter_context(closing(Contender(name, kind, argument, variables)))

        ours = {d: start(d, Ours, argparse.Namespace(**{**plain, "dtype": d}), KEEP_MEMORY) for d in dtypes}
        rival = start("torch", Torch, (ours[dtypes[0]].ask("shapes"), len(cores)), capped)
        result = {
            "config": Path(args.config).stem,
            "tp": args.tp,
            "num_layers": args.num_layers,
            "threads": len(cores),
            "isa": {d: ours[d].ask("isa") for d in dtypes},
            "cpu": extension.cpu_name(),
            "torch": torch.__version__,
            "torch_environment": capped,
            **contest(rows, ours, rival, args.rounds),
            "busy_cores": {name: c.ask("busy_cores") for name, c in [*ours.items(), ("torch", rival)]},
        }
    print(table(result))
    print(json.dumps(result), flush=True)


def checked(args: argparse.Namespace, group: Group) -> tuple[list[int], tuple[int, ...]]:
    """Rows, and the cores to use. Raises InputError for flags that cannot be run."""
    if group.world_size > 1:
        raise InputError("perf/gemm.py runs without a launcher; --tp gives the shapes of one of several ranks")
    try:
        rows = [int(n) for n in args.rows.split(",")]
    except ValueError:
        rows = [0]
    if min(rows) < 1:
        raise InputError(f"--rows {args.rows!r}: expected numbers of 1 or more, such as 1,16,512")
    for flag in ("tp", "rounds"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag} {getattr(args, flag)}: expected 1 or more")
    cores = allowed_cores()
    if not 0 <= args.threads <= len(cores):
        raise InputError(f"--threads {args.threads}: this process has {len(cores)} cores")
    return rows, tuple(cores[: args.threads or None])


def layers_past_the_cache(args: argparse.Namespace) -> int:
    """Layers whose weights, at half a byte an element, are four times the last-level cache."""
    try:
        config = read_config_json(Path(args.config))
        known = family(str(config["model_type"]))
        params = known.params(known.config_from_hf(config))
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None
    layer = [p for p in params if p.kind == "linear" and p.name.startswith("layers.0.")]
    elements = sum(math.prod(source.shape) for p in layer for source in p.sources)
    layers: int = math.ceil(4 * last_level_cache_bytes() * 2 * args.tp / elements)
    return max(2, layers)


def last_level_cache_bytes() -> int:
    """As the kernel has it; 64 MiB where it says nothing."""
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    kib: int = max((int(f.read_text().strip().removesuffix("K")) for f in caches), default=64 << 10)
    return kib << 10


def torch_environment(isa: str, cores: tuple[int, ...]) -> dict[str, str]:
    """Pins torch's threads, and caps it at the instruction set that `--isa` forces on ours."""
    try:
        cap = {} if isa == "auto" else CAPS[extension.resolve_isa(isa)]
    except ValueError as error:
        raise InputError(str(error)) from None
    return {"OMP_NUM_THREADS": str(len(cores)), "GOMP_CPU_AFFINITY": " ".join(map(str, cores)), **cap}


def contest(all_rows: list[int], ours: dict[str, Contender], rival: Contender, rounds: int) -> dict[str, Any]:
    """Every case, the ceilings that the first of ours measured in between, and the ratios of each dtype."""
    lead, timed, ceilings = next(iter(ours.values())), [], []
    for rows in all_rows:
        ceilings.append(lead.ask("ceilings"))
        timed += compare(rows, ours, rival, rounds)
    read_gb_s, bf16_tflops, int8_tops = (max(values) for values in zip(*ceilings, strict=True))
    cases = [rates(case, read_gb_s, int8_tops if case["dtype"] == "w8a8" else bf16_tflops) for case in timed]
    return {
        "read_gb_s": round(read_gb_s, 2),
        "bf16_tflops": round(bf16_tflops, 4),
        "int8_tops": round(int8_tops, 4),
        "ratio": {dtype: summary([case for case in cases if case["dtype"] == dtype]) for dtype in ours},
        "cases": cases,
    }


def compare(rows: int, ours: dict[str, Contender], rival: Contender, rounds: int) -> list[dict[str, Any]]:
    """One case for each dtype and layer at so many rows: medians over all turns but a first one."""
    contenders = [*ours.values(), rival]
    implementations = rival.ask("implementations", rows)
    times: dict[str, dict[str, list[float]]] = {c.name: defaultdict(list) for c in contenders}
    for turn in range(-1, rounds):
        for contender in contenders:
            time.sleep(0.01)  # until the threads of the one before have stopped spinning
            for layer, values in contender.ask("turn", rows).items():
                times[contender.name][layer] += values if turn >= 0 else []
    medians = {name: {layer: statistics.median(v) for layer, v in t.items()} for name, t in times.items()}
    return [
        {
            "dtype": dtype,
            "rows": rows,
            **weight,
            "us": round(medians[dtype][weight["layer"]], 2),
            "torch_us": round(medians[rival.name][weight["layer"]], 2),
            "torch_runs": implementations[weight["layer"]],
        }
        for dtype, contender in ours.items()
        for weight in contender.ask("layers")
    ]


def rates(case: dict[str, Any], read_gb_s: float, peak_tflops: float) -> dict[str, Any]:
    """A case with what its time means."""
    gb_s = case["weight_bytes"] / case["us"] / 1e3
    tflops = 2 * case["rows"] * case["n"] * case["k"] / case["us"] / 1e6
    return {
        **case,
        "gb_s": round(gb_s, 2),
        "read_fraction": round(gb_s / read_gb_s, 4),
        "tflops": round(tflops, 4),
        "peak_fraction": round(tflops / peak_tflops, 4),
        "ratio": round(case["torch_us"] / case["us"], 3),
    }


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric mean and worst of the ratios to torch, at many rows and at few."""
    many = [case["ratio"] for case in cases if case["rows"] >= MANY_ROWS]
    few = [case["ratio"] for case in cases if case["rows"] < MANY_ROWS]
    return {
        f"{name}_{what}": round(figure(values), 3) if values else None
        for name, values in (("many_rows", many), ("few_rows", few))
        for what, figure in (("geomean", statistics.geometric_mean), ("worst", min))
    }


def table(r: dict[str, Any]) -> str:
    """The figures for a person."""
    lines = [
        f"{r['config']}, tp {r['tp']}, {r['num_layers']} layers; {r['threads']} threads; torch {r['torch']}",
        f"{r['read_gb_s']:.1f} GB/s read; peak {r['bf16_tflops']:.3f} TFLOP/s bf16, {r['int8_tops']:.3f} TOP/s int8",
        "cores busy: " + "; ".join(f"{name} {', '.join(map(str, c))}" for name, c in r["busy_cores"].items()),
        f"{'rows':>5} {'layer':<8} {'n':>6} {'k':>6} {'dtype':<6} {'us':>10} {'GB/s':>7} {'read':>5} {'TFLOP/s':>8} "
        f"{'peak':>5} {'torch us':>10} {'ratio':>6}  torch ran",
    ]
    lines += [
        f"{c['rows']:>5} {c['layer']:<8} {c['n']:>6} {c['k']:>6} {c['dtype']:<6} {c['us']:>10.1f} {c['gb_s']:>7.2f} "
        f"{c['read_fraction']:>5.2f} {c['tflops']:>8.3f} {c['peak_fraction']:>5.2f} {c['torch_us']:>10.1f} "
        f"{c['ratio']:>6.2f}  {c['torch_runs']}"
        for c in r["cases"]
    ]
    for dtype, ratio in r["ratio"].items():
        for name, label in (("many_rows", f"{MANY_ROWS} rows and more"), ("few_rows", f"fewer than {MANY_ROWS} rows")):
            if ratio[f"{name}_geomean"] is not None:
                mean, worst = ratio[f"{name}_geomean"], ratio[f"{name}_worst"]
                lines.append(f"{dtype} ({r['isa'][dtype]}) over torch bf16, {label}: {mean:.2f}x, worst {worst:.2f}x")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
