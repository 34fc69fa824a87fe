"""The command line: flags in, calls out. Nothing else parses flags or prints."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from distinf import comm
from distinf.comm import Group, InputError, agreed
from distinf.config import DTYPES, ISAS, KERNELS, KV_DTYPES, LOAD_FORMATS, MEMBINDS, RunConfig
from distinf.device import Device, device_rank, parse_devices
from distinf.engine import Sequence
from distinf.hetero.report import phase_texts, tuning_report, tuning_text
from distinf.hetero.tune import CACHE_DIR, ROWS, Load, tune, tune_cached, within_memory
from distinf.info import describe
from distinf.llm import LLM, Completion, peak_rss_mb
from distinf.memory import available_bytes
from distinf.plan import Plan, RankReport, as_table, report
from distinf.sampling import SamplingParams
from distinf.shard import PhaseShares, parse_shares
from distinf.stats import decode_rates, measure_read_gb_s, percentiles, token_gaps_ms
from distinf.tokenizer import DEFAULT_MODEL, find_model
from distinf.weights import Checkpoint, open_checkpoint

_COMMS = "|".join(("auto", *comm.BACKENDS))


class _Parser(argparse.ArgumentParser):
    """Errors are raised: every rank parses the same line and only rank 0 may print."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that choose the model and how it is run; also those of perf/latency.py."""
    add_weight_arguments(parser)
    parser.add_argument(
        "--device", action="append", default=[], metavar="[RANK=]cpu|cuda[:N]|emulated:speed=S,...",
        help="what a rank (default: the last) computes on; once for each rank that is no cpu",
    )  # fmt: skip
    parser.add_argument(
        "--gpu-fraction", metavar="F|A,F,V|auto",
        help="part of the rank with a --device: of all, or of attention, FFN, head; auto: see distinf tune",
    )  # fmt: skip
    parser.add_argument("--gpu-memory-gb", type=float, metavar="GB", help="most for the weights on a --device")
    parser.add_argument("--gpu-stream-all", action="store_true", help="keep no weights on the GPU: for comparison")
    parser.add_argument("--tune-cache", default=CACHE_DIR, metavar="DIR", help="what auto found (default: %(default)s)")
    parser.add_argument("--comm", default="auto", metavar=_COMMS, help="collectives (default: %(default)s)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=comm.DEFAULT_TIMEOUT_S,
        metavar="S",
        help="end the job when a rank keeps others waiting longer, seconds; 600 while loading (default: %(default)s)",
    )
    parser.add_argument(
        "--comm-dtype",
        default="fp32",
        metavar="|".join(comm.WIRE_DTYPES),
        help="partial sums between ranks (default: fp32)",
    )
    parser.add_argument("--kernels", default="auto", metavar="|".join(KERNELS), help="(default: %(default)s)")
    parser.add_argument("--isa", default="auto", metavar="|".join(ISAS), help="instruction set (default: best)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="per rank (default: its cores)")
    parser.add_argument("--membind", default="auto", metavar="|".join(MEMBINDS), help="memory (default: %(default)s)")
    parser.add_argument("--no-capture", dest="capture", action="store_false", help="run every decode step eagerly")
    parser.add_argument("--load-format", default="auto", metavar="|".join(LOAD_FORMATS), help="dummy: random weights")
    parser.add_argument("--pack-cache", metavar="DIR", help="keep packed weights here for the next start")
    parser.add_argument("--config", metavar="FILE", help="config.json for --load-format dummy")
    parser.add_argument("--num-layers", type=int, metavar="N", help="layers for --load-format dummy")


def add_weight_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that decide what a rank holds in memory."""
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="DIR|GGUF|NAME", help="checkpoint (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        default="bf16",
        metavar="|".join(DTYPES),
        help="weights; auto: as the checkpoint has them (default: %(default)s)",
    )
    parser.add_argument("--head-dtype", metavar="DTYPE", help="of the head (default: as --dtype; int8 for w8a8)")
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="G",
        help="weights that share a scale; 0: a channel (default: 32 in int4, else 0)",
    )
    parser.add_argument("--zero-points", action="store_true", help="a zero point for each scale of int8 and int4")
    parser.add_argument(
        "--shares", metavar="S,S,...", help="part of the model for each rank; auto: see distinf tune (default: equal)"
    )
    parser.add_argument(
        "--expert-parallel", action="store_true", help="whole experts to ranks, by their shares, not columns of each"
    )
    parser.add_argument("--kv-dtype", default="bf16", metavar="|".join(KV_DTYPES), help="cache (default: %(default)s)")


def load_llm(args: argparse.Namespace, group: Group, kv_tokens: int) -> LLM:
    """The model that the flags of `add_model_arguments` ask for, with room for `kv_tokens`."""
    load = loader(args, group, kv_tokens, args.pack_cache)
    if "auto" not in (args.shares, args.gpu_fraction):
        return load(None, None)
    if args.gpu_fraction == "auto":
        agreed(group, lambda: device_rank(parse_devices(args.device, group.world_size)))
    asked = {key: vars(args)[key] for key in _TUNED_FOR}
    trial, start = loader(args, group, kv_tokens), start_shares(args, group)
    shares = tune_cached(trial, asked, group, args.tune_cache, args.gpu_memory_gb, start)
    _notifier(group)("shares found: " + ", ".join(phase_texts(shares)))
    return load(shares, None)


def start_shares(args: argparse.Namespace, group: Group) -> PhaseShares | None:
    """Where the tuner begins: as the flags say (None), unless --gpu-memory-gb makes that doubtful.

    Raises InputError for --expert-parallel, since what is measured and balanced are columns, and for --gpu-stream-all.
    """
    if args.expert_parallel:
        raise InputError("--expert-parallel: shares of whole experts are not tuned; expected --shares as numbers")
    if args.gpu_stream_all:
        raise InputError(
            "--gpu-stream-all: shares for it are not tuned; expected --shares or --gpu-fraction as numbers"
        )
    devices = agreed(group, lambda: parse_devices(args.device, group.world_size))
    return None if args.gpu_memory_gb is None else within_memory(devices)


# Flags that shares depend on, besides those that `tune_cached` is given.
_TUNED_FOR = (
    "model", "dtype", "head_dtype", "group_size", "zero_points", "device", "comm_dtype", "kernels", "isa", "threads",
    "membind", "capture", "load_format", "kv_dtype", "config", "num_layers",
)  # fmt: skip


def loader(args: argparse.Namespace, group: Group, kv_tokens: int, pack_cache: str | None = None) -> Load:
    """Loads what the flags ask for, on shares and devices in the place of theirs; auto means equal shares here."""
    notify = _notifier(group)

    def load(shares: PhaseShares | None, devices: tuple[Device, ...] | None) -> LLM:
        asked = None if args.shares == "auto" else args.shares
        fraction = None if args.gpu_fraction == "auto" else args.gpu_fraction
        return LLM(
            args.model, dtype=args.dtype, head_dtype=args.head_dtype, group_size=args.group_size,
            zero_points=args.zero_points, shares=shares or asked, devices=devices or args.device,
            gpu_fraction=fraction, gpu_memory_gb=args.gpu_memory_gb, gpu_stream_all=args.gpu_stream_all,
            kernels=args.kernels, isa=args.isa, threads=args.threads, load_format=args.load_format,
            kv_dtype=args.kv_dtype, config=args.config, num_layers=args.num_layers, membind=args.membind, group=group,
            capture=args.capture, timeout_s=args.timeout, kv_tokens=kv_tokens, progress=sys.stderr.isatty(),
            notify=notify, pack_cache=pack_cache, expert_parallel=args.expert_parallel,
        )  # fmt: skip

    return load


def _notifier(group: Group) -> Callable[[str], None]:
    """Prints lines on rank 0's stderr; what models loaded one after the other have to say alike, once."""
    told: set[str] = set()

    def notify(line: str) -> None:
        if group.rank == 0 and line not in told:
            told.add(line)
            print(f"distinf: {line}", file=sys.stderr, flush=True)

    return notify


def build_parser() -> argparse.ArgumentParser:
    """`distinf generate|plan|tune|info`."""
    parser = _Parser(prog="distinf", description="Large language models on CPU sockets, one machine or many.")
    commands = parser.add_subparsers(dest="command", required=True)

    generate = commands.add_parser("generate", help="complete a prompt")
    add_model_arguments(generate)
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file with the prompt's text")
    prompt.add_argument("--token-ids", metavar="N,N,...", help="the prompt as token ids")
    generate.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(default: %(default)s)")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: greedy (default)")
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="0: no limit (default)")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1: no limit (default)")
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: %(default)s)")
    generate.add_argument("--ignore-eos", action="store_true", help="go on past the end of the text")
    generate.add_argument("--json", action="store_true", help="last line of stdout: one JSON object of results")
    generate.set_defaults(run=run_generate)

    plan = commands.add_parser("plan", help="what each rank will hold, and whether it fits; loads nothing")
    add_weight_arguments(plan)
    plan.add_argument("--world-size", type=int, default=1, metavar="N", help="ranks (default: %(default)s)")
    plan.add_argument("--ranks-per-node", type=int, metavar="N", help="ranks on a machine (default: all)")
    plan.add_argument("--batch", type=int, default=1, metavar="B", help="sequences at once (default: %(default)s)")
    plan.add_argument("--context", type=int, metavar="C", help="tokens of each (default: the model's context)")
    plan.add_argument("--memory-gb", type=float, metavar="GB", help="memory of a rank (default: this machine's part)")
    plan.add_argument("--json", action="store_true", help="one JSON object instead of text")
    plan.set_defaults(run=run_plan, comm="single")

    tuning = commands.add_parser("tune", help="measure the ranks and choose their shares")
    add_model_arguments(tuning)
    tuning.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once (default: %(default)s)")
    tuning.add_argument(
        "--rows",
        default=",".join(map(str, ROWS)),
        metavar="N,N,...",
        help="steps that are measured (default: %(default)s)",
    )
    tuning.add_argument("--json", action="store_true", help="one JSON object instead of text")
    tuning.set_defaults(run=run_tune)

    info = commands.add_parser("info", help="versions, instruction sets, placement of each rank")
    info.add_argument("--comm", default="auto", metavar=_COMMS, help="(default: %(default)s)")
    info.add_argument("--threads", type=int, default=0, metavar="N", help="per rank (default: its cores)")
    info.add_argument("--membind", default="auto", metavar="|".join(MEMBINDS), help="memory (default: %(default)s)")
    info.add_argument("--json", action="store_true", help="one JSON object instead of text")
    info.set_defaults(run=run_info)
    return parser


def run_generate(args: argparse.Namespace, group: Group) -> None:
    """`distinf generate`."""
    params = agreed(group, lambda: _sampling(args))
    prompt = agreed(group, lambda: _prompt(args))
    # A text's tokens are counted when its tokenizer is loaded; the answer's room is known now.
    llm = load_llm(args, group, params.max_new_tokens + (len(prompt) if isinstance(prompt, list) else 0))
    prompts: Any = [prompt]
    (completion,) = llm.generate(prompts, params, chat=args.chat, on_token=_streamer(llm))
    report = _report(llm, completion)
    if group.rank == 0:
        print(flush=True)
        print(_summary(report), file=sys.stderr)
        if args.json:
            print(json.dumps(report), flush=True)


def _sampling(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(args.temperature, args.top_k, args.top_p, args.seed, args.max_new_tokens, args.ignore_eos)


def _prompt(args: argparse.Namespace) -> str | list[int]:
    if args.token_ids is not None:
        return _numbers("--token-ids", args.token_ids)
    if args.prompt_file is not None:
        try:
            text = Path(args.prompt_file).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"--prompt-file {args.prompt_file}: not a UTF-8 text file") from None
        except OSError as error:
            raise ValueError(f"--prompt-file {args.prompt_file}: {error.strerror}") from None
    else:
        text = args.prompt
    if not text:
        raise ValueError("the prompt is empty; expected some text")
    return str(text)


def _numbers(flag: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"{flag} {text!r}: expected whole numbers separated by commas") from None


def _streamer(llm: LLM) -> Callable[[Sequence], None]:
    """Prints text on rank 0 as it comes."""
    if llm.group.rank != 0 or llm.tokenizer is None:
        return lambda sequence: None
    step = llm.tokenizer.stream()
    return lambda sequence: print(step(sequence.generated[-1]), end="", flush=True)


def _report(llm: LLM, completion: Completion) -> dict[str, Any]:
    """The fields of `--json`; collective. Memory is read before the ceiling is measured with a buffer of its own."""
    group, times = llm.group, completion.token_times_s
    peak = group.all_gather_object(round(peak_rss_mb(), 1))
    ceiling = measure_read_gb_s(llm.loaded.kernels, group)
    weight_bytes = sum(group.all_gather_object(llm.loaded.weights.bytes_per_token))
    tpot = percentiles(token_gaps_ms(times))
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(completion.prompt_token_ids),
        "new_tokens": len(completion.token_ids),
        "ttft_ms": round(1e3 * times[0], 3),
        "tpot_ms": tpot,
        "decode_tok_s": round((len(times) - 1) / (times[-1] - times[0]), 2) if len(times) > 1 else None,
        "prefill_tok_s": round(len(completion.prompt_token_ids) / times[0], 2),
        **decode_rates(weight_bytes, tpot.get("p50"), ceiling),
        "weight_bytes_per_token": weight_bytes,
        "world_size": group.world_size,
        "shares": [float(s) for s in llm.run.shares.ffn],
        "attention_shares": [float(s) for s in llm.run.shares.attention],
        "vocab_shares": [float(s) for s in llm.run.shares.vocab],
        "devices": [str(device) for device in llm.loaded.devices],
        "dtype": llm.run.dtype,
        "kv_dtype": llm.run.kv_dtype,
        "isa": llm.loaded.kernels.isa,
        "comm": group.name,
        "kernels": llm.loaded.kernels.name,
        "threads": llm.loaded.kernels.threads,
        "load_s": round(llm.load_s, 3),
        "peak_rss_mb": peak,
    }


def _summary(report: dict[str, Any]) -> str:
    """The figures a person wants after an answer, two lines."""
    ranks = f"{report['world_size']} rank{'s' if report['world_size'] > 1 else ''} x {report['threads']}"
    first = (
        f"{report['prompt_tokens']} + {report['new_tokens']} tokens | TTFT {report['ttft_ms']:.1f} ms | "
        f"{ranks} threads, {report['dtype']}, {report['kernels']} {report['isa']}, {report['comm']}"
    )
    if not report["tpot_ms"]:
        return first
    return (
        f"{first}\n{report['tpot_ms']['p50']:.2f} ms/token | {report['decode_tok_s']:.1f} tokens/s | "
        f"{report['read_gb_s']:.1f} GB/s read = {100 * report['roofline']:.0f} % of this machine's "
        f"{report['roofline_read_gb_s']:.1f} GB/s"
    )


def run_plan(args: argparse.Namespace, group: Group) -> None:
    """`distinf plan`: exit status 0 when every rank fits, 1 when one does not."""
    ranks, memory = agreed(group, lambda: _plan(args))
    largest = max(range(len(ranks)), key=lambda i: ranks[i].total)
    fits = ranks[largest].total <= memory
    if args.json:
        rows = [{**r.sizes(), **{k: [v.start, v.stop] for k, v in asdict(r.shard).items()}} for r in ranks]
        print(json.dumps({"dtype": args.dtype, "memory": memory, "fits": fits, "ranks": rows}), flush=True)
    else:
        print(as_table(ranks))
        verdict = f"rank {largest} needs {ranks[largest].total / 1e9:.1f} GB of {memory / 1e9:.1f} GB"
        print(f"{'yes' if fits else 'no'}: {verdict}", flush=True)
    if not fits:
        sys.exit(1)


def _plan(args: argparse.Namespace) -> tuple[list[RankReport], int]:
    """Every rank's needs, and the bytes that each may use."""
    for flag in ("world_size", "batch", "context", "ranks_per_node"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {value}: expected 1 or more")
    shares = PhaseShares.of(parse_shares(args.shares, args.world_size))
    run = RunConfig(
        args.dtype, args.head_dtype, args.group_size, args.zero_points, shares, kv_dtype=args.kv_dtype,
        expert_parallel=args.expert_parallel,
    )  # fmt: skip
    model = find_model(args.model)
    plan = Plan.of(_described(model, args.dtype), run)
    context = args.context or plan.config.max_positions
    if context > plan.config.max_positions:
        raise ValueError(f"--context {context} exceeds the model's {plan.config.max_positions} tokens")
    per_node = min(args.ranks_per_node or args.world_size, args.world_size)
    memory = available_bytes() // per_node if args.memory_gb is None else int(args.memory_gb * 1e9)
    # Ranks of a machine share the mapped embedding table where the file has it as it is computed with.
    sharing = 1 if model.suffix == ".gguf" or args.dtype == "fp32" else per_node
    return report(plan, args.batch * context, sharing), memory


def _described(model: Path, dtype: str) -> Checkpoint:
    """A checkpoint whose weights are not opened, unless what they are is the question."""
    if model.suffix == ".json" or (model.is_dir() and dtype != "auto"):
        return open_checkpoint(model, "dummy", model if model.suffix == ".json" else None, None)
    return open_checkpoint(model, "auto", None, None)


def run_tune(args: argparse.Namespace, group: Group) -> None:
    """`distinf tune`."""
    if args.batch < 1:
        raise InputError(f"--batch {args.batch}: expected 1 or more")
    rows = tuple(agreed(group, lambda: _numbers("--rows", args.rows)))
    if not rows or min(rows) < 1:
        raise InputError(f"--rows {args.rows!r}: expected numbers of 1 or more")
    tuning = tune(loader(args, group, 0), rows, args.batch, args.gpu_memory_gb, start_shares(args, group))
    if group.rank == 0:
        print(json.dumps(tuning_report(tuning)) if args.json else tuning_text(tuning), flush=True)


def run_info(args: argparse.Namespace, group: Group) -> None:
    """`distinf info`."""
    run = agreed(group, lambda: RunConfig(threads=args.threads, membind=args.membind))
    facts, warnings = describe(group, run)
    ranks = group.all_gather_object(facts)
    notify = _notifier(group)
    for text in warnings:
        notify(f"warning: {text}")
    if group.rank != 0:
        return
    if args.json:
        print(json.dumps({"world_size": group.world_size, "ranks": ranks, "warnings": warnings}), flush=True)
        return
    for rank, facts in enumerate(ranks):
        print(f"rank {rank}")
        for key, value in facts.items():
            print(f"  {key:<14} {value}")


def main(argv: list[str] | None = None) -> None:
    """Run a command on this rank. Exit status 2 and one line for bad input; any other failure ends the whole job."""
    run_ranks(build_parser(), argv)


def run_ranks(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> None:
    """Parse flags, join the group that `--comm` names, and call `args.run(args, group)`: also perf's entry."""
    group: Group | None = None
    try:
        args = parser.parse_args(argv)
        try:
            group = comm.init(args.comm, getattr(args, "comm_dtype", "fp32"))
        except ValueError as error:
            raise InputError(str(error)) from None
        args.run(args, group)
    except InputError as error:
        if (comm.launched_rank() or 0) == 0:
            print(f"distinf: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except BaseException as error:
        if isinstance(error, SystemExit):  # --help
            raise
        _die(error, group)


def _die(error: BaseException, group: Group | None) -> NoReturn:
    """Say which rank failed and where, and take the other ranks along: they would wait for it forever."""
    rank = comm.launched_rank() or 0
    if not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    name = type(error).__name__
    print(f"distinf: rank {rank} on {socket.gethostname()} failed: {name}: {error}", file=sys.stderr, flush=True)
    if group is not None:
        group.abort()
    os._exit(1)
