"""What an all-reduce costs: alone, for each backend and size, and inside the decode step of a model.

    launch/mpirun.sh -n 2 -- python perf/allreduce.py
    launch/mpirun.sh -n 2 -- python perf/allreduce.py --decode --load-format dummy --config perf/models/lab-1b.json

Alone: sums of fp32 one after the other, each until the last rank has it, p50 and p99 in microseconds; every backend
by the same native loop. `--decode` runs the model once with each backend: what each rank waits for others in a token,
least of all ranks (the collectives themselves) and most (with what ranks are late). Prints tables, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import socket
import time
from typing import Any

import torch

from distinf import comm
from distinf.cli import add_model_arguments, load_llm, run_ranks
from distinf.comm import Group, InputError
from distinf.sampling import SamplingParams
from distinf.stats import percentiles, token_gaps_ms

SIZES = tuple(4096 * 4**i for i in range(7))  # 4 KiB to 16 MiB: what decode and prefill add
WARM_UP = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--backends", metavar="B,B,...", help="(default: all that can be had)")
    parser.add_argument("--repeats", type=int, default=5000, help="of the smallest size (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="over all backends, in turn (default: %(default)s)")
    parser.add_argument("--decode", action="store_true", help="also inside the decode step of the model")
    parser.add_argument("--output-len", type=int, default=64, help="tokens of --decode (default: %(default)s)")
    parser.set_defaults(run=measure)
    run_ranks(parser)


def measure(args: argparse.Namespace, group: Group) -> None:
    """Time, and report; on every rank."""
    groups = open_groups(args, group)
    times: dict[str, dict[int, list[float]]] = {name: {size: [] for size in SIZES} for name in groups}
    for _ in range(args.rounds):
        for name, each in groups.items():
            for size in SIZES:
                times[name][size] += time_us(each, size, max(args.repeats * SIZES[0] // size, 50))
    results = {
        name: {size: {f"p{p}_us": value for p, value in quantiles(us).items()} for size, us in sizes.items()}
        for name, sizes in times.items()
    }
    decode = {name: decode_step(args, each) for name, each in groups.items()} if args.decode else {}
    hosts = sorted(set(group.all_gather_object(socket.gethostname())))
    if group.rank == 0:
        print(table(results))
        print("\n".join(f"{name}: {row(figures)}" for name, figures in decode.items()))
        report = {"results": results, "decode": decode, "world_size": group.world_size, "hosts": hosts}
        print(json.dumps(report), flush=True)


def open_groups(args: argparse.Namespace, group: Group) -> dict[str, Group]:
    """A group for each backend by its own name: shm is shm+mpi on several hosts."""
    wanted = args.backends.split(",") if args.backends else [name for name in comm.BACKENDS if name != "single"]
    groups: dict[str, Group] = {}
    for name in wanted:
        try:
            opened = comm.init(name, args.comm_dtype)
        except ValueError as error:
            if args.backends:
                raise InputError(str(error)) from None
            continue
        opened.make_room(SIZES[-1] // 4)
        groups[opened.name] = opened
    return groups


def time_us(group: Group, size: int, repeats: int) -> list[float]:
    """Of each sum of `size` bytes: until the last rank has it."""
    x, warm_up = torch.zeros(size // 4), min(WARM_UP, repeats)
    group.barrier()
    if group.native:
        seconds = group.native.time_s(x.data_ptr(), x.numel(), warm_up + repeats)
    else:
        seconds = [timed(group, x) for _ in range(warm_up + repeats)]
    everyone = torch.tensor(group.all_gather_object(seconds[warm_up:]))
    return (1e6 * everyone.amax(0)).tolist()


def timed(group: Group, x: torch.Tensor) -> float:
    """Seconds of one sum."""
    start = time.perf_counter()
    group.all_reduce_(x)
    return time.perf_counter() - start


def quantiles(values: list[float]) -> dict[int, float]:
    """The median and the 99th percentile."""
    q50, q99 = torch.tensor(values).quantile(torch.tensor([0.5, 0.99])).tolist()
    return {50: round(q50, 2), 99: round(q99, 2)}


def decode_step(args: argparse.Namespace, group: Group) -> dict[str, Any]:
    """One model, one batch of one: its time per token, and each rank's waiting in it."""
    llm = load_llm(args, group, 32 + args.output_len)
    params = SamplingParams(max_new_tokens=args.output_len, ignore_eos=True)
    prompt = [list(range(32))]
    llm.generate(prompt, params)
    before = waited(group)
    times_s = llm.generate(prompt, params)[0].token_times_s
    waits_ms = [1e3 * s / args.output_len for s in group.all_gather_object(waited(group) - before)]
    tpot_ms = percentiles(token_gaps_ms(times_s))["p50"]
    return {
        "tpot_ms": tpot_ms,
        "waited_ms_per_token": [round(ms, 4) for ms in waits_ms],
        "collectives_fraction": round(min(waits_ms) / tpot_ms, 4),
        "imbalance_fraction": round((max(waits_ms) - min(waits_ms)) / tpot_ms, 4),
    }


def waited(group: Group) -> float:
    """Seconds that this rank has spent at meeting points so far."""
    return float(group.native.waited_s) if group.native else 0.0


def table(results: dict[str, Any]) -> str:
    """p50 and p99 in microseconds, a column for each size."""
    head = f"{'us: p50 / p99':<14}" + "".join(f"{size >> 10:>14} KiB" for size in SIZES)
    rows = [
        f"{name:<14}" + "".join(f"{r['p50_us']:>9.2f} /{r['p99_us']:>7.1f}" for r in sizes.values())
        for name, sizes in results.items()
    ]
    return "\n".join([head, *rows])


def row(figures: dict[str, Any]) -> str:
    """One backend's decode step."""
    waits = ", ".join(f"{ms:.3f}" for ms in figures["waited_ms_per_token"])
    return (
        f"{figures['tpot_ms']:.2f} ms/token; ranks wait {waits} ms: collectives "
        f"{100 * figures['collectives_fraction']:.1f} %, imbalance {100 * figures['imbalance_fraction']:.1f} %"
    )


if __name__ == "__main__":
    main()
