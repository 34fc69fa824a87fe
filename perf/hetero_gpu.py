"""What a GPU beside the CPU gives: one CPU rank and one GPU rank, without a launcher. perf/hetero_gpu.sh runs it.

    python perf/hetero_gpu.py --configs perf/models/opt-6.7b.json --layers 12

HeteGen's setting (MLSys 2024, figure 8): OPT in 16 bits, batch 1, a prompt of 512, 64 new tokens, GPU memory capped as
there. Random weights. For time's sake a model has `--layers` of its layers, and a cap is reduced alike; 0: all of them.
Each model is run streamed whole (--gpu-stream-all: what offloading does), with the shares that the tuner finds under
the smallest cap, with those that the same measurements give under larger ones, and with all the memory there is.

Prints each model's table and, last, one JSON line. `over_stream_all` is in tokens/s, with the prompt's time counted as
the paper does; `of_link` is what streaming reaches of the bandwidth from pinned memory, measured beside it. No figure
has been taken on a GPU with it yet.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from distinf.comm.segment import map_shared
from distinf.comm.single import SingleGroup
from distinf.device import Device, parse_devices
from distinf.hetero.tune import Tuning, ranked, room_of, token_gemms_ms, tune, within_memory
from distinf.kernels import extension
from distinf.llm import LLM
from distinf.plan import Plan
from distinf.sampling import SamplingParams
from distinf.shard import PhaseShares

# GB of GPU memory at which figure 8 has a point of HeteGen's: smallest, middle and largest.
CAPS_GB = {"opt-6.7b": (0.8, 4.9, 13.0), "opt-13b": (1.1, 8.9, 18.9), "opt-30b": (1.6, 11.0, 20.3)}
CONFIGS = ",".join(f"perf/models/{name}.json" for name in CAPS_GB)
# Sums without a copy: of 512 prompt tokens in a model as wide as 8192.
_SUM_NUMBERS = 512 * 8192


class Pair(SingleGroup):
    """See distinf.comm.Group: two processes of one machine and a pipe. Also the node that map_shared asks for."""

    name = "pair"
    world_size = 2

    def __init__(self, rank: int, pipe: Connection) -> None:
        self.rank, self._pipe = rank, pipe
        reduce, capacity = extension.AllReduce, _SUM_NUMBERS
        memory, problem = map_shared(self, reduce.part_bytes(capacity), reduce.memory_bytes(2, capacity))
        if memory is None:
            raise OSError(problem)
        self._memory = memory
        self.native = reduce(memory.data_ptr(), capacity, rank, 2, False, False, None)

    def all_reduce_(self, x: torch.Tensor) -> None:
        self.native.sum_(x.data_ptr(), x.numel())

    def all_gather_object(self, x: Any) -> list[Any]:
        self._pipe.send(x)
        other = self._pipe.recv()
        return [x, other] if self.rank == 0 else [other, x]

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        # As arrays: tensors would travel as descriptors of shared memory.
        return torch.stack([torch.from_numpy(part) for part in self.all_gather_object(x.numpy().copy())])

    def broadcast_object(self, x: Any = None) -> Any:
        return self.all_gather_object(x)[0]

    def barrier(self) -> None:
        self.all_gather_object(None)

    def node_mates(self) -> list[int]:
        return [0, 1]

    def abort(self) -> None:
        os._exit(1)

    # What map_shared calls of an MPI communicator.
    bcast, Barrier = broadcast_object, barrier

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", default=CONFIGS, metavar="FILE,...", help="config.json of models")
    parser.add_argument("--layers", type=int, default=12, help="of each model (default: %(default)s; 0: all)")
    parser.add_argument("--device", default="cuda", help="of the second rank (default: %(default)s)")
    parser.add_argument("--input-len", type=int, default=512, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=64, help="new tokens (default: %(default)s)")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ends = context.Pipe()
    ranks = [context.Process(target=work, args=(rank, ends[rank], args)) for rank in range(2)]
    for process in ranks:
        process.start()
    while any(process.is_alive() for process in ranks):
        if any(process.exitcode for process in ranks):  # the other would wait for it forever
            for process in ranks:
                process.kill()
        time.sleep(0.2)
    raise SystemExit(int(any(process.exitcode for process in ranks)))


def work(rank: int, pipe: Connection, args: argparse.Namespace) -> None:
    """One rank: every model, then rank 0's report."""
    group, devices = Pair(rank, pipe), parse_devices([args.device], 2)
    results = []
    for config in args.configs.split(","):
        results.append(measure(config, args, group, devices))
        if rank == 0:
            print(table(results[-1]), flush=True)  # whatever becomes of the next one
    if rank == 0:
        print(json.dumps({"device": str(devices[1]), "models": results}), flush=True)


def measure(config: str, args: argparse.Namespace, group: Pair, devices: tuple[Device, ...]) -> dict[str, Any]:
    """Tokens/s of a model: streamed whole, under each of the paper's caps, and without one. Collective."""
    name, whole = Path(config).stem, int(json.loads(Path(config).read_text())["num_hidden_layers"])
    layers = args.layers or whole
    caps = [cap * layers / whole for cap in CAPS_GB.get(name, ())]

    def load(shares: PhaseShares | None, on: tuple[Device, ...] | None, **how: Any) -> LLM:
        return LLM(
            shares=shares, devices=on or devices, load_format="dummy", config=config, num_layers=layers, group=group,
            **how,
        )  # fmt: skip

    result: dict[str, Any] = {"model": name, "layers": layers, "of_layers": whole, "stream_all": None, "points": []}
    if devices[1].kind == "cuda":
        result["stream_all"] = run_streamed(load(PhaseShares.of([0, 1]), None, gpu_stream_all=True), args)
    tuning: Tuning | None = None
    plan: Plan | None = None
    for cap in [*caps, None]:
        if tuning is None or plan is None or cap is None:
            tuning = tune(partial(load, gpu_memory_gb=cap), (), 1, cap, within_memory(devices))
            chosen, shares, predicted_ms = tuning.chosen.name, tuning.chosen.shares, tuning.chosen.predicted_ms
            result.setdefault("cpu_only_ms", round(_start_ms(tuning), 3))
        else:
            room = room_of(plan, tuning.devices, cap, tuning.profile)
            chosen, shares = ranked(plan, tuning.devices, tuning.profile, 1, room)[0]
            predicted_ms = tuning.rest_ms + token_gemms_ms(plan, tuning.profile, 1, room, shares)
        llm = load(shares, tuning.devices, gpu_memory_gb=cap)
        point, plan = run(llm, args), llm.loaded.plan
        del llm  # its memory is needed for the next
        point |= {"cap_gb": cap, "chosen": chosen, "predicted_ms": round(predicted_ms, 3)}
        point["fractions"] = {phase: round(float(of[1] / sum(of)), 4) for phase, of in vars(shares).items()}
        if result["stream_all"]:
            point["over_stream_all"] = round(point["tok_s"] / result["stream_all"]["tok_s"], 3)
        result["points"].append(point)
    return result


def _start_ms(tuning: Tuning) -> float:
    """A token with everything on the CPU rank, where the tuner began."""
    found = next(c.measured_ms for c in tuning.candidates if c.name == "as given")
    assert found is not None
    return found


def run_streamed(llm: LLM, args: argparse.Namespace) -> dict[str, Any]:
    """The baseline, with GB/s beside those of the link."""
    group, weights = llm.group, llm.loaded.weights
    link_gb_s = group.all_gather_object(llm.loaded.kernels.link_gb_s())[1]
    found, nbytes = run(llm, args), sum(group.all_gather_object(weights.bytes_per_token))
    gb_s = nbytes / found["tpot_ms"] / 1e6
    return found | {
        "gb_s": round(gb_s, 2),
        "link_gb_s": round(link_gb_s, 2),
        "of_link": round(gb_s / link_gb_s, 4),
    }


def run(llm: LLM, args: argparse.Namespace) -> dict[str, Any]:
    """Median time of a decode step, and new tokens a second with the prompt's time counted. Collective."""
    prompt = [(7919 * i) % llm.config.vocab for i in range(args.input_len)]
    params = SamplingParams(max_new_tokens=args.output_len, ignore_eos=True)
    llm.generate([prompt], SamplingParams(max_new_tokens=3, ignore_eos=True))
    times = llm.generate([prompt], params)[0].token_times_s
    tpot_s = statistics.median(b - a for a, b in pairwise(times[2:]))  # the first two gaps record and capture
    return {
        "tpot_ms": round(1e3 * tpot_s, 3),
        "ttft_ms": round(1e3 * times[0], 3),
        "tok_s": round(len(times) / times[-1], 3),
    }


def table(result: dict[str, Any]) -> str:
    """A model's figures for a person."""
    lines = [f"{result['model']}, {result['layers']} of {result['of_layers']} layers"]
    lines.append(f"  {'CPU alone':<34} {result['cpu_only_ms']:9.2f} ms/token")
    base = result["stream_all"]
    if base:
        share = f"{base['gb_s']:.1f} GB/s, {base['of_link']:.3f} of the link's {base['link_gb_s']:.1f}"
        lines.append(f"  {'--gpu-stream-all':<34} {base['tpot_ms']:9.2f} ms/token {base['tok_s']:9.2f} tok/s  {share}")
    for point in result["points"]:
        cap = "all memory" if point["cap_gb"] is None else f"{point['cap_gb']:.2f} GB"
        over = f"  {point['over_stream_all']:.2f}x" if "over_stream_all" in point else ""
        lines.append(
            f"  {cap + ': ' + point['chosen']:<34} {point['tpot_ms']:9.2f} ms/token {point['tok_s']:9.2f} tok/s"
            f"{over}  predicted {point['predicted_ms']:.2f} ms"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
