"""Perplexity of a model on text that every Python installation has: what a weight dtype costs in quality.

    python perf/perplexity.py --dtype int8 --against fp32
    launch/mpirun.sh -n 2 -- python perf/perplexity.py --model path/to/hf_directory --dtype int4

The text is the Python language reference as `pydoc_data.topics` ships it for `help()`: plain prose with some
code, 450 000 characters in one file of the standard library, the same on every machine with the same Python.
(Licence texts are too short, docstrings differ with how Python was built.) It does change with the Python
version, so absolute figures are to be compared under one: the JSON line has the version and a hash of the text.

The first --tokens tokens are cut into windows that do not overlap; each window starts anew, and its first token
is not scored. Prints a table, then one JSON line. With --against DTYPE the same is done in that dtype (every
other flag of how to compute at its default), and the perplexity's increase over it is given in percent.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import os
import platform
import pydoc_data.topics
import time
from pathlib import Path
from typing import Any

from distinf.cli import add_model_arguments, load_llm, run_ranks
from distinf.comm import Group, InputError, agreed

# What --against keeps: which model, and the ranks and cores that it runs on.
KEPT = ("model", "shares", "comm", "threads", "load_format", "config", "num_layers", "tokens", "window")


def main() -> None:
    run_ranks(build_parser())


def build_parser() -> argparse.ArgumentParser:
    """The flags; those of the model and two of the text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--tokens", type=int, default=20480, help="of the text (default: %(default)s)")
    parser.add_argument("--window", type=int, default=512, help="tokens at once (default: %(default)s)")
    parser.add_argument("--against", metavar="DTYPE", help="compare with this dtype, such as fp32")
    parser.set_defaults(run=measure)
    return parser


def measure(args: argparse.Namespace, group: Group) -> None:
    """Score in one dtype, or in two one after the other, and report; on every rank."""
    if args.window < 2 or args.tokens < args.window:
        raise InputError(f"--tokens {args.tokens} --window {args.window}: expected tokens >= window >= 2")
    cores = os.sched_getaffinity(0)
    result = score(args, group)
    if args.against:
        gc.collect()  # the first model is gone before the second one comes
        os.sched_setaffinity(0, cores)  # its kernels left this thread on one core
        reference = score(against(args), group)
        result["against"] = reference
        result["increase_percent"] = round(100 * (result["perplexity"] / reference["perplexity"] - 1), 4)
    if group.rank == 0:
        print(table(result))
        print(json.dumps(result), flush=True)


def against(args: argparse.Namespace) -> argparse.Namespace:
    """The flags of the second run."""
    kept = {name: getattr(args, name) for name in KEPT}
    return argparse.Namespace(**{**vars(build_parser().parse_args([])), **kept, "dtype": args.against})


def score(args: argparse.Namespace, group: Group) -> dict[str, Any]:
    """Load, score every window, and let go of the model; collective."""
    llm = load_llm(args, group, args.window)
    if args.window > llm.config.max_positions:
        raise InputError(f"--window {args.window}: the model's context is {llm.config.max_positions} tokens")
    topics = agreed(group, text)
    ids = llm.tokenize(topics)
    if len(ids) < args.tokens:
        raise InputError(f"--tokens {args.tokens}: the text has {len(ids)} tokens in this model's vocabulary")
    starts = range(0, args.tokens - args.window + 1, args.window)
    start = time.perf_counter()
    loss = -math.fsum(x for i in starts for x in llm.engine.score(ids[i : i + args.window]).tolist())
    seconds = time.perf_counter() - start
    scored = len(starts) * (args.window - 1)
    kernels = llm.loaded.kernels
    return {
        "model": Path(args.config).stem if args.config else args.model,
        **{name: value for name, value in vars(llm.run).items() if isinstance(value, str | int)},
        "perplexity": round(math.exp(loss / scored), 5),
        "loss": round(loss / scored, 7),
        "tokens": scored,
        "windows": len(starts),
        "window": args.window,
        "seconds": round(seconds, 2),
        "tok_s": round(scored / seconds, 1),
        "load_s": round(llm.load_s, 3),
        "weight_bytes_per_token": sum(group.all_gather_object(llm.loaded.weights.bytes_per_token)),
        "world_size": group.world_size,
        "threads": kernels.threads,
        "isa": kernels.isa,
        "kernels": kernels.name,
        "comm": group.name,
        "python": platform.python_version(),
        "text_sha256": hashlib.sha256(topics.encode()).hexdigest()[:16],
    }


def text() -> str:
    """The language reference, its topics in alphabetical order."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def table(r: dict[str, Any]) -> str:
    """The figures for a person."""
    runs = [r, r["against"]] if "against" in r else [r]
    lines = [
        f"{r['model']}: {r['tokens']} tokens of Python {r['python']}'s help topics, {r['windows']} windows of "
        f"{r['window']}; {r['world_size']} ranks x {r['threads']} threads, {r['comm']}",
        f"{'dtype':<8} {'perplexity':>11} {'loss':>10} {'seconds':>8} {'tok/s':>8} {'MB/token':>9}  kernels",
    ]
    lines += [
        f"{x['dtype']:<8} {x['perplexity']:>11.5f} {x['loss']:>10.6f} {x['seconds']:>8.1f} {x['tok_s']:>8.1f} "
        f"{x['weight_bytes_per_token'] / 1e6:>9.1f}  {x['kernels']} {x['isa']}"
        for x in runs
    ]
    if "against" in r:
        lines.append(f"{r['dtype']} against {r['against']['dtype']}: {r['increase_percent']:+.3f} %")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
