"""Time per token of distinf and of llama.cpp on one GGUF file, taking turns on the same cores.

    python3 -m venv .venv-llama && .venv-llama/bin/pip install llama-cpp-python
    python perf/beside_llama_cpp.py --llama-python .venv-llama/bin/python --model model.gguf

llama-cpp-python comes as source and is compiled for this CPU. Each turn is a process of its own, so that
neither can disturb the other's threads: perf/latency.py with --dtype auto, which keeps the file's own numbers (those of
a block type that has no format here become bf16), and the same measurement by perf/llama_cpp_latency.py.

Prints a table of medians over the turns, then one JSON line. GB/s is the read bandwidth measured before and after each
turn (perf/roofline.py), which on a shared machine may change in between: the ratio of times per token is at equal
bandwidth, as far as a turn had what was measured around it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from distinf.binding import allowed_cores
from distinf.tokenizer import DEFAULT_MODEL, find_model

HERE = Path(__file__).parent
FIGURES = ("ttft_ms", "tpot_ms", "ceiling_gb_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", required=True, metavar="PYTHON", help="a Python that has llama-cpp-python")
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="GGUF|NAME", help="(default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="of ours (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(allowed_cores()), help="(default: %(default)s)")
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=64, help="new tokens (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of a turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: %(default)s)")
    args = parser.parse_args()

    try:
        result = compare(args)
    except (ValueError, OSError) as error:
        print(f"beside_llama_cpp.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(table(result))
    print(json.dumps(result), flush=True)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """The turns' figures. Raises ValueError or OSError when a measurement cannot be made."""
    names = ("threads", "input_len", "output_len", "runs")
    for name, least in (*((name, 1) for name in names), ("output_len", 2), ("rounds", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {least} or more")
    same = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    ours = [sys.executable, str(HERE / "latency.py"), "--model", args.model, "--dtype", args.dtype]
    theirs = [args.llama_python, str(HERE / "llama_cpp_latency.py"), "--model", str(find_model(args.model))]
    commands = {"llama.cpp": [*theirs, *same], "distinf": [*ours, *same]}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            before = read_gb_s(args.threads)
            done = turn(command)
            turns[name].append({**done, "ceiling_gb_s": (before + read_gb_s(args.threads)) / 2})
    first = turns["llama.cpp"][0]
    result = {**vars(args), "llama_cpp": first["version"], "system": first["system"]}
    for name, done in turns.items():
        result[name] = {figure: [round(p50(t[figure]), 3) for t in done] for figure in FIGURES}
    return result


def read_gb_s(threads: int) -> float:
    """What so many threads read from memory now."""
    measured = turn([sys.executable, str(HERE / "roofline.py"), "--threads", str(threads)])
    return float(measured["rows"][0]["read_gb_s"])


def turn(command: list[str]) -> dict[str, Any]:
    """One measurement. Raises ValueError with its last words when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout:
        words = done.stderr.strip().splitlines() or [f"no figures, and status {done.returncode}"]
        raise ValueError(f"{' '.join(command[:2])}: {words[-1]}")
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return last


def p50(figure: float | dict[str, float]) -> float:
    """Of perf/latency.py's percentiles, or the one number that there is."""
    return figure["p50"] if isinstance(figure, dict) else figure


def at_equal_bandwidth(r: dict[str, Any]) -> float:
    """llama.cpp's time per token over ours, each times what the memory gave around its turn: medians of both."""
    bytes_of = {
        name: statistics.median(t * g for t, g in zip(r[name]["tpot_ms"], r[name]["ceiling_gb_s"], strict=True))
        for name in ("distinf", "llama.cpp")
    }
    return bytes_of["llama.cpp"] / bytes_of["distinf"]


def table(r: dict[str, Any]) -> str:
    """The figures for a person."""
    lines = [
        f"{r['model']}, {r['threads']} threads, {r['input_len']} in / {r['output_len']} out",
        f"{'':<12} {'TTFT ms':>9} {'TPOT ms':>9} {'GB/s':>9}",
    ]
    medians = {name: [statistics.median(r[name][figure]) for figure in FIGURES] for name in ("distinf", "llama.cpp")}
    lines += [f"{name:<12} {ttft:>9.1f} {tpot:>9.2f} {read:>9.1f}" for name, (ttft, tpot, read) in medians.items()]
    ours, theirs = (medians[name][0] for name in ("distinf", "llama.cpp"))
    lines.append(f"{'ratio':<12} {theirs / ours:>8.2f}x {at_equal_bandwidth(r):>8.2f}x")
    lines.append(f"llama-cpp-python {r['llama_cpp']}: {r['system']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
