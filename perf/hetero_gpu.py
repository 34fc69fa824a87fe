"""What a GPU beside the CPU gives: one CPU rank and one GPU rank, without a launcher. Run by perf/hetero_gpu.sh.

    python perf/hetero_gpu.py --configs perf/models/opt-6.7b.json,perf/models/opt-30b.json --layers 4

HeteGen's setting (MLSys 2024, figure 8): 16 bits, batch 1, a prompt of 512, 64 new tokens, GPU memory capped at the
paper's smallest values. To fit ten minutes a model has `--layers` layers and its cap is reduced alike: tokens/s are per
those layers, and what is compared, tuned shares against --gpu-stream-all, is affected only through the head, which
weighs more. One JSON line for each model, then one for the link. No timing has been taken with it yet.
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
from distinf.hetero.tune import tune, within_memory
from distinf.kernels import native
from distinf.llm import LLM
from distinf.sampling import SamplingParams
from distinf.shard import PhaseShares

# GB of GPU memory: the smallest that figure 8 has for each model.
CAPS_GB = {"opt-6.7b": 0.8, "opt-13b": 1.1, "opt-30b": 1.6}
_H2D_BYTES = 1 << 30


class Pair(SingleGroup):
    """See distinf.comm.Group: two processes of one machine and a pipe. Also the node that map_shared asks for."""

    name = "pair"
    world_size = 2

    def __init__(self, rank: int, pipe: Connection) -> None:
        self.rank, self._pipe = rank, pipe
        size = native.AllReduce.memory_bytes(2)
        memory, problem = map_shared(self, native.AllReduce.PART_BYTES, size)
        if memory is None:
            raise OSError(problem)
        self._memory = memory
        self.native = native.AllReduce(memory.data_ptr(), rank, 2, False, False, None)

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
    parser.add_argument("--configs", required=True, metavar="FILE,FILE,...", help="models, by their config.json")
    parser.add_argument("--layers", type=int, default=4, help="of each model (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="of the second rank (default: %(default)s)")
    parser.add_argument("--input-len", type=int, default=512, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=64, help="new tokens (default: %(default)s)")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ends = context.Pipe()
    workers = [context.Process(target=work, args=(rank, ends[rank], args)) for rank in range(2)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        if any(worker.exitcode for worker in workers):  # the other would wait for it forever
            for worker in workers:
                worker.kill()
        time.sleep(0.2)
    raise SystemExit(max(abs(worker.exitcode or 0) for worker in workers) and 1)


def work(rank: int, pipe: Connection, args: argparse.Namespace) -> None:
    """One rank. The GPU's keeps one core, for the sums; the others multiply."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[-1:] if rank else cores[:-1] or cores)
    group = Pair(rank, pipe)
    devices = parse_devices([args.device], 2)
    for config in args.configs.split(","):
        result = model(config, args, group, devices)
        if rank == 0:
            print(json.dumps(result), flush=True)
    if rank == 1 and devices[1].kind == "cuda":
        print(json.dumps({"pinned_h2d_gb_s": round(h2d_gb_s(), 2)}), flush=True)


def model(config: str, args: argparse.Namespace, group: Pair, devices: tuple[Device, ...]) -> dict[str, Any]:
    """Tokens/s of a model: streamed whole, within the paper's memory, and with all the memory there is."""
    name = Path(config).stem
    fields = json.loads(Path(config).read_text())
    layers = args.layers / fields["num_hidden_layers"]
    cap_gb = CAPS_GB[name] * layers if name in CAPS_GB else None
    shape: dict[str, Any] = {"load_format": "dummy", "config": config, "num_layers": args.layers, "group": group}

    def load(shares: PhaseShares | None, on: tuple[Device, ...] | None, **how: Any) -> LLM:
        return LLM(shares=shares, devices=on or devices, **shape, **how)

    result: dict[str, Any] = {"model": name, "layers": args.layers, "device": str(devices[1]), "cap_gb": cap_gb}
    whole = PhaseShares.of([0, 1])
    if devices[1].kind == "cuda":
        llm = load(whole, None, gpu_stream_all=True)
        streamed_s, times = run(llm, args)
        weight_bytes = sum(group.all_gather_object(llm.loaded.weights.bytes_per_token))
        del llm
        result["stream_all"] = {"tok_s": times, "gb_s": round(weight_bytes / streamed_s / 1e9, 2)}
    for label, memory in (("capped", cap_gb), ("uncapped", None)):
        start = within_memory(devices)
        tuning = tune(partial(load, gpu_memory_gb=memory), (), 1, memory, start)
        tpot_s, times = run(load(tuning.chosen.shares, tuning.devices, gpu_memory_gb=memory), args)
        result[label] = {
            "chosen": tuning.chosen.name,
            "shares": {phase: [str(s) for s in shares] for phase, shares in vars(tuning.chosen.shares).items()},
            "predicted_ms": round(tuning.chosen.predicted_ms, 3),
            "tpot_ms": round(1e3 * tpot_s, 3),
            "tok_s": times,
        }
    return result


def run(llm: LLM, args: argparse.Namespace) -> tuple[float, float]:
    """Median seconds of a decode step, and new tokens a second with the prompt's time counted, as the paper does."""
    prompt = [(7919 * i) % llm.config.vocab for i in range(args.input_len)]
    params = SamplingParams(max_new_tokens=args.output_len, ignore_eos=True)
    llm.generate([prompt], params)
    times = llm.generate([prompt], params)[0].token_times_s
    tok_s = len(times) / times[-1]
    return statistics.median(b - a for a, b in pairwise(times[1:])), round(tok_s, 3)


def h2d_gb_s() -> float:
    """Bandwidth from pinned memory to the device, best of five."""
    host, device = (
        torch.empty(_H2D_BYTES, dtype=torch.uint8, pin_memory=True),
        torch.empty(_H2D_BYTES, dtype=torch.uint8, device="cuda"),
    )
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, _H2D_BYTES / (time.perf_counter() - start) / 1e9)
    return best


if __name__ == "__main__":
    main()
