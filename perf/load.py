"""Loading beside what reading and copying the same bytes takes, what each rank reads, and how much memory it needs.

    launch/mpirun.sh -n 2 -- python perf/load.py --dir /var/tmp/lab-1b
    launch/mpirun.sh -n 2 -- python perf/load.py --dir /var/tmp/lab-1b --dtype int4 --pack-cache /var/tmp/packed

Writes random weights of --config as safetensors into --dir where there are none. The floor is `cat` of the files plus
one copy of their bytes into memory that was not touched before, as loading has to fill. With --pack-cache, which has
to be a directory without entries, loads a second time. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from distinf.cli import run_ranks
from distinf.comm import Group, InputError, agreed
from distinf.config import DTYPES, RunConfig
from distinf.device import parse_devices
from distinf.llm import load_model
from distinf.models import family
from distinf.shard import PhaseShares, parse_shares
from distinf.weights import open_checkpoint

LAB_1B = Path(__file__).resolve().parent / "models/lab-1b.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True, help="a Hugging Face directory, made where it is missing")
    parser.add_argument("--config", default=str(LAB_1B), metavar="FILE", help="of what is made (default: lab-1b)")
    parser.add_argument("--dtype", default="bf16", metavar="|".join(DTYPES), help="(default: %(default)s)")
    parser.add_argument("--pack-cache", metavar="DIR", help="load a second time from packed weights")
    parser.add_argument("--comm", default="auto")
    parser.set_defaults(run=measure)
    run_ranks(parser)


def measure(args: argparse.Namespace, group: Group) -> None:
    """Make, warm up, time, report; on every rank."""
    directory, cache = Path(args.dir), Path(args.pack_cache) if args.pack_cache else None
    agreed(group, lambda: make(directory, Path(args.config)) if group.rank == 0 else None)
    if cache and group.rank == 0 and cache.is_dir() and any(cache.iterdir()):
        raise InputError(f"--pack-cache {cache}: expected a directory without entries")
    files = sorted(directory.glob("*.safetensors"))
    nbytes = sum(f.stat().st_size for f in files)
    cat_s, copy_s = floor(files, nbytes) if group.rank == 0 else (0.0, 0.0)
    shares = PhaseShares.of(parse_shares(None, group.world_size))
    run = RunConfig(dtype=args.dtype, shares=shares, devices=parse_devices([], group.world_size))
    first = load(directory, run, group, cache)
    ranks = group.all_gather_object(first)
    load_s = max(r["load_s"] for r in ranks)
    mapped = ranks[0]["mapped_bytes"]  # of the embedding table, which all ranks share
    result = {
        "dtype": args.dtype,
        "world_size": group.world_size,
        "file_bytes": nbytes,
        "cat_s": round(cat_s, 3),
        "copy_s": round(copy_s, 3),
        "load_s": load_s,
        "load_over_floor": round(load_s / (cat_s + copy_s), 2) if group.rank == 0 else None,
        "read_over_file": round((sum(r["read_bytes"] for r in ranks) + mapped) / nbytes, 4),
        "peak_over_final_rss": max(r["peak_over_final_rss"] for r in ranks),
        "ranks": ranks,
    }
    if cache:
        result["second_load_s"] = max(r["load_s"] for r in group.all_gather_object(load(directory, run, group, cache)))
    if group.rank == 0:
        for key, value in result.items():
            print(f"{key:<20} {value}")
        print(json.dumps(result), flush=True)


def make(directory: Path, config_json: Path) -> None:
    """Random weights of a config, one file."""
    if (directory / "config.json").exists():
        return
    hf = json.loads(config_json.read_text())
    known = family(hf["model_type"])
    shapes = {name: s for p in known.params(known.config_from_hf(hf)) for name, s in p.shapes().items()}
    directory.mkdir(parents=True, exist_ok=True)
    save_file({n: torch.randn(s).mul_(0.02).bfloat16() for n, s in shapes.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(hf))


def floor(files: list[Path], nbytes: int) -> tuple[float, float]:
    """Seconds of `cat` from the page cache, and of a copy into fresh memory: the best of three each."""
    command = ["cat", *map(str, files)]
    source = np.ones(min(nbytes, 256 << 20), np.uint8)  # larger than any cache

    def cat() -> None:
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)

    def copy() -> None:
        target = np.empty(nbytes, np.uint8)
        for i in range(0, nbytes, len(source)):
            part = target[i : i + len(source)]
            np.copyto(part, source[: len(part)])

    cat()  # into the page cache
    return best_of_three(cat), best_of_three(copy)


def best_of_three(work: Callable[[], None]) -> float:
    """Seconds."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def load(directory: Path, run: RunConfig, group: Group, cache: Path | None) -> dict[str, Any]:
    """Load once; what this rank did meanwhile."""
    group.node_mates()  # the first collective connects the ranks
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _read_bytes()
    group.barrier()
    start = time.perf_counter()
    loaded = load_model(open_checkpoint(directory, "auto", None, None), run, group, pack_cache=cache)
    load_s = time.perf_counter() - start
    tables = [t for t in loaded.weights.tensors.values() if t.dtype == torch.bfloat16]
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    peak, final = (int(status[key].split()[0]) for key in ("VmHWM", "VmRSS"))
    return {
        "load_s": round(load_s, 3),
        "read_bytes": _read_bytes() - before,
        "mapped_bytes": sum(t.nbytes for t in tables),
        "packed_bytes": loaded.weights.bytes_per_token,
        "final_rss_mb": round(final * 1024 / 1e6, 1),
        "peak_over_final_rss": round(peak / final, 3),
    }


def _read_bytes() -> int:
    """What this process has read by system calls, page cache included."""
    return int(Path("/proc/self/io").read_text().split()[1])


if __name__ == "__main__":
    main()
