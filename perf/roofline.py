"""What this machine's memory and arithmetic can do: every other number in perf/ is a share of these.

    python perf/roofline.py [--threads 1,2]

For each number of threads: read bandwidth (one contiguous prefetched run per thread, 2 MiB pages, far larger
than the caches), and the bf16 and int8 peaks of every instruction set found, in 1e12 operations a second.
Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys

from distinf.binding import allowed_cores
from distinf.comm.single import SingleGroup
from distinf.kernels import extension, native
from distinf.stats import measure_read_gb_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", help="thread counts, such as 1,2,4 (default: 1 and all cores)")
    args = parser.parse_args()
    cores, isas = allowed_cores(), extension.available_isas()
    if not isas:
        sys.exit("perf/roofline.py: the extension is not built or this CPU has no AVX2")
    counts = [int(n) for n in args.threads.split(",")] if args.threads else sorted({1, len(cores)})
    if not all(1 <= n <= len(cores) for n in counts):
        parser.error(f"--threads {args.threads}: expected numbers from 1 to {len(cores)}")
    rows = [measure(cores[:n], isas) for n in counts]
    print(f"{'threads':>8} {'read GB/s':>10} " + " ".join(f"{isa + ' bf16 / int8':>24}" for isa in isas))
    for row in rows:
        peaks = " ".join(f"{row['bf16_tflops'][isa]:>15.3f} / {row['int8_tops'][isa]:.3f} " for isa in isas)
        print(f"{row['threads']:>8} {row['read_gb_s']:>10.1f} {peaks}")
    print(json.dumps({"cpu": extension.cpu_name(), "rows": rows}))


def measure(cpus: list[int], isas: list[str]) -> dict[str, object]:
    """One row: a team pinned to `cpus`, per instruction set."""
    teams = {isa: native.NativeKernels(isa, cpus, oversubscribed=False) for isa in isas}
    return {
        "threads": len(cpus),
        "read_gb_s": round(max(measure_read_gb_s(k, SingleGroup()) for k in teams.values()), 2),
        "bf16_tflops": {isa: round(k.measure_peak_tops(int8=False), 4) for isa, k in teams.items()},
        "int8_tops": {isa: round(k.measure_peak_tops(int8=True), 4) for isa, k in teams.items()},
    }


if __name__ == "__main__":
    main()
