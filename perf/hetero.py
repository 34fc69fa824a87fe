"""ms/token against the fraction of the rank that has a --device, measured and predicted, and what the tuner chooses.

    launch/mpirun.sh -n 2 -- python perf/hetero.py --device emulated:speed=2,latency_us=25,link_gb_s=24 \\
        --load-format dummy --config perf/models/lab-1b.json --png hetero.png
    launch/mpirun.sh -n 2 -- python perf/hetero.py --device 0=emulated:speed=2 --device 1=emulated:speed=1 ...

Prints a table, then with --json one JSON line. `predicted_ms` is the tuner's model: GEMMs and reductions as it measured
them, and a constant taken from the candidates that it tried. An emulated world's rates are measured once, for all
points. With several devices there is no fraction to sweep: equal shares and the tuner's are compared with the bound
that water-filling gives.
"""

from __future__ import annotations

import argparse
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

from distinf.cli import add_model_arguments, loader, run_ranks, start_shares
from distinf.comm import Group, InputError, agreed
from distinf.device import device_rank
from distinf.hetero.report import tuning_report
from distinf.hetero.solve import token_s, water_fill
from distinf.hetero.tune import Tuning, decode_ms, tune
from distinf.shard import PhaseShares, parse_shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--batch", type=int, default=1, help="sequences at once (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="timed of each point (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of the fraction from 0 to 1 (default: %(default)s)")
    parser.add_argument("--png", metavar="FILE", help="plot the sweep (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="last line of stdout: one JSON object")
    parser.set_defaults(run=measure)
    run_ranks(parser)


def measure(args: argparse.Namespace, group: Group) -> None:
    """Tune, sweep, report. Collective."""
    for flag, least in (("batch", 1), ("tokens", 4), ("steps", 1)):
        if getattr(args, flag) < least:
            raise InputError(f"--{flag} {getattr(args, flag)}: expected {least} or more")
    plot = agreed(group, lambda: _matplotlib() if args.png else None)
    load = loader(args, group, 0)
    tuning = tune(load, (), args.batch, args.gpu_memory_gb, start_shares(args, group))
    plan = load(tuning.chosen.shares, tuning.devices).loaded.plan
    lines, reduce_s = tuning.profile.lines[args.batch], tuning.profile.reduce_s[args.batch]

    def point(shares: PhaseShares) -> dict[str, float]:
        gemms_s = token_s(plan.config, lines, shares, reduce_s, plan.ffn_multiple)
        predicted_ms = 1e3 * gemms_s + tuning.rest_ms
        llm = load(shares, tuning.devices)
        return {"tpot_ms": round(decode_ms(llm, args.batch, args.tokens), 4), "predicted_ms": round(predicted_ms, 4)}

    equal = PhaseShares.of(parse_shares(None, group.world_size))
    result: dict[str, Any] = {
        "sweep": [],
        "device": [str(device) for device in tuning.devices],
        "model": Path(args.config).stem if args.config else args.model,
        "dtype": args.dtype,
        "batch": args.batch,
        "equal": point(equal),
        "auto": {"fraction": None, **point(tuning.chosen.shares)},
        "bound_ms": round(_bound_ms(tuning, plan.config.n_layers, lines, reduce_s), 4),
        "tuning": tuning_report(tuning),
    }
    if len([device for device in tuning.devices if device.kind != "cpu"]) == 1:
        rank = device_rank(tuning.devices)
        result["auto"]["fraction"] = round(_fraction(tuning.chosen.shares, rank), 4)
        for i in range(args.steps + 1):
            shares = equal.with_device(rank, (Fraction(i, args.steps),) * 3)
            result["sweep"].append({"fraction": i / args.steps, **point(shares)})
    if group.rank == 0:
        print(table(result))
        if plot:
            draw(plot, result, args.png)
        if args.json:
            print(json.dumps(result), flush=True)


def _bound_ms(tuning: Tuning, n_layers: int, lines: dict[str, Any], reduce_s: float) -> float:
    """A token's time if every phase could be split anywhere."""
    free = {phase: water_fill(of_ranks, [1.0] * len(of_ranks))[1] for phase, of_ranks in lines.items()}
    return 1e3 * (n_layers * (free["attention"] + free["ffn"] + 2 * reduce_s) + free["vocab"]) + tuning.rest_ms


def _fraction(shares: PhaseShares, rank: int) -> float:
    """The device's part of the FFN, which is most of a model."""
    return float(shares.ffn[rank] / sum(shares.ffn))


def table(result: dict[str, Any]) -> str:
    """The sweep for a person."""
    rows = [("fraction", "ms/token", "predicted")]
    rows += [(f"{p['fraction']:.1f}", f"{p['tpot_ms']:.3f}", f"{p['predicted_ms']:.3f}") for p in result["sweep"]]
    for name in ("equal", "auto"):
        at = result[name].get("fraction")
        label = name if at is None else f"{name} {at:.3f}"
        rows.append((label, f"{result[name]['tpot_ms']:.3f}", f"{result[name]['predicted_ms']:.3f}"))
    lines = [f"{a:<12} {b:>10} {c:>10}" for a, b, c in rows]
    lines.append(
        f"bound        {result['bound_ms']:10.3f}: {result['bound_ms'] / result['auto']['tpot_ms']:.3f} reached"
    )
    if result["sweep"]:
        best = min(p["tpot_ms"] for p in result["sweep"])
        lines.append(f"auto / best of the sweep: {result['auto']['tpot_ms'] / best:.3f}")
    return "\n".join(lines)


def _matplotlib() -> Any:
    """Raises ValueError without the package."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--png needs matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")  # files only
    from matplotlib import pyplot

    return pyplot


def draw(pyplot: Any, result: dict[str, Any], path: str) -> None:
    """The sweep and the choice as a picture."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    fractions = [p["fraction"] for p in result["sweep"]]
    axes.plot(fractions, [p["tpot_ms"] for p in result["sweep"]], "o-", label="measured")
    axes.plot(fractions, [p["predicted_ms"] for p in result["sweep"]], "--", label="predicted")
    if result["auto"]["fraction"] is not None:
        axes.plot(result["auto"]["fraction"], result["auto"]["tpot_ms"], "r*", markersize=14, label="tuner's choice")
    axes.set(xlabel="fraction on the device", ylabel="ms/token", ylim=(0, None), title="; ".join(result["device"]))
    axes.title.set_fontsize(7)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
