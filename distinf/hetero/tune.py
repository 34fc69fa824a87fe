"""Which rank takes how much: measured, solved for equal finish, tried, and kept for the next time."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from distinf.comm import LOADING_TIMEOUT_S, Group, agreed
from distinf.config import ModelConfig
from distinf.device import Device, parse_devices
from distinf.hetero import profile
from distinf.hetero.profile import Profile
from distinf.hetero.solve import Lines, Room, best_shares, streamed, streamed_shares, token_s
from distinf.kernels import Kernels, extension
from distinf.llm import LLM, bind_rank, on_device
from distinf.plan import Plan
from distinf.sampling import SamplingParams
from distinf.shard import TILE, PhaseShares
from distinf.stats import token_gaps_ms

CACHE_DIR = "~/.cache/distinf/tune"
# Rows of a step that are measured: decode batches, and prompts.
ROWS = (1, 8, 32, 512, 2048)
# Candidates that are tried besides the one that everything starts from.
_TRIED = 3
_CLEARLY = 0.98  # medians of a few tokens differ by a percent or two from run to run
_PROMPT_TOKENS, _NEW_TOKENS = 8, 16

# Makes the model that is tuned, with given shares and devices. Collective.
Load = Callable[[PhaseShares | None, tuple[Device, ...] | None], LLM]


@dataclass(frozen=True)
class Candidate:
    """Shares that were considered, and the time of a token with them."""

    name: str
    shares: PhaseShares
    predicted_ms: float
    measured_ms: float | None = None


@dataclass(frozen=True)
class Tuning:
    """What the tuner chose, and why. The same on every rank."""

    batch: int  # sequences that are decoded at once
    chosen: Candidate
    candidates: list[Candidate]
    profile: Profile
    rest_ms: float  # of a token outside GEMMs and reductions, see judge
    devices: tuple[Device, ...]  # with the rates in use


def tune(
    load: Load,
    rows: tuple[int, ...] = ROWS,
    batch: int = 1,
    memory_gb: float | None = None,
    start: PhaseShares | None = None,
) -> Tuning:
    """Shares for the least time of a decode step of `batch` sequences. Collective.

    A token is measured with the shares `start` (None: as the load has them) before anything is known. `rows` are
    measured besides `batch`; `memory_gb` limits the weights of ranks that are no plain cpu. Raises InputError when the
    ranks have no room for the model.
    """
    llm = load(start, None)
    plan, group, devices = llm.loaded.plan, llm.group, llm.loaded.devices
    measured_ms = decode_ms(llm, batch)
    first, new_kernels = llm.run.shares, _kernel_factory(llm)
    del llm  # its memory is needed for the next
    group.begin("measuring the ranks", LOADING_TIMEOUT_S)
    found = profile.measure(plan, group, new_kernels, tuple(sorted({*rows, batch})))
    room = room_of(plan, devices, memory_gb, found)
    options = [("as given", first), *agreed(group, lambda: ranked(plan, devices, found, batch, room))]
    measured = [measured_ms, *(decode_ms(load(shares, devices), batch) for _, shares in options[1 : 1 + _TRIED])]
    judged, rest_ms = judge(options, [token_gemms_ms(plan, found, batch, room, s) for _, s in options], measured)
    return Tuning(batch, choose(judged[: len(measured)]), judged, found, rest_ms, devices)


def judge(
    options: list[tuple[str, PhaseShares]], gemms_ms: list[float], measured_ms: list[float]
) -> tuple[list[Candidate], float]:
    """A prediction for every option, the first of which were measured; and the ms of a token beside `gemms_ms`.

    Those are alike for all: the median of what was measured counts, so that one disturbed trial shifts nothing.
    """
    rest_ms = statistics.median(measured - gemms for measured, gemms in zip(measured_ms, gemms_ms, strict=False))
    found = [
        Candidate(name, shares, gemms + rest_ms, measured)
        for ((name, shares), gemms), measured in zip_longest(zip(options, gemms_ms, strict=True), measured_ms)
    ]
    return found, rest_ms


def token_gemms_ms(plan: Plan, found: Profile, batch: int, room: Room, shares: PhaseShares) -> float:
    """A token's time in GEMMs and reductions by these measurements."""
    lines = streamed(plan.config, found.lines[batch], room, shares)
    return 1e3 * token_s(plan.config, lines, shares, found.reduce_s[batch], plan.ffn_multiple)


def ranked(
    plan: Plan, devices: tuple[Device, ...], found: Profile, batch: int, room: Room
) -> list[tuple[str, PhaseShares]]:
    """What comes into question, the best first. Raises ValueError when the ranks have no room for the model."""
    options = candidates(plan.config, found.lines[batch], room, devices, plan.ffn_multiple)
    return sorted(options, key=lambda option: token_gemms_ms(plan, found, batch, room, option[1]))


def within_memory(devices: tuple[Device, ...]) -> PhaseShares | None:
    """Shares to start from where devices have little memory: all on plain ranks. None where there is none."""
    plain = [int(device.kind == "cpu") for device in devices]
    return PhaseShares.of(plain) if any(plain) else None


def choose(tried: list[Candidate]) -> Candidate:
    """The one that was predicted best, unless another was clearly faster."""
    first, *others = sorted(tried, key=lambda c: c.predicted_ms)
    fastest = min(others, key=_measured_ms, default=first)
    return fastest if _measured_ms(fastest) < _CLEARLY * _measured_ms(first) else first


def _measured_ms(candidate: Candidate) -> float:
    assert candidate.measured_ms is not None
    return candidate.measured_ms


def candidates(
    config: ModelConfig, lines: Lines, room: Room, devices: tuple[Device, ...], ffn_multiple: int = TILE
) -> list[tuple[str, PhaseShares]]:
    """All or nothing on the ranks that are no plain cpu, the solution, its neighbours, and more than fits if the rest
    can be streamed; the same shares only once.

    The solution is whole units already; a neighbour has what a tenth more, or less, time on those ranks would give.
    Raises ValueError without room for the model.
    """
    special = [device.kind != "cpu" for device in devices]
    mixed = any(special) and not all(special)
    options = []
    for name, used in (("no device", False), ("device only", True)) if mixed else ():
        allowed = [b if s == used else 0.0 for b, s in zip(room.rank_bytes, special, strict=True)]
        with suppress(ValueError):  # it does not fit there
            options.append((name, best_shares(config, lines, replace(room, rank_bytes=allowed), ffn_multiple)))
    options.append(("balanced", best_shares(config, lines, room, ffn_multiple)))
    for name, factor in (
        (("a little less on the device", 1.1), ("a little more on the device", 1 / 1.1)) if mixed else ()
    ):
        options.append((name, best_shares(config, _scaled(lines, special, factor), room, ffn_multiple)))
    if any(room.link_gb_s):
        with suppress(ValueError):  # no room for the buffers
            options.append(("partly streamed", streamed_shares(config, lines, room, ffn_multiple)))
    different: list[tuple[str, PhaseShares]] = []
    for option in options:
        if option[1] not in [shares for _, shares in different]:
            different.append(option)
    return different


def _scaled(lines: Lines, special: list[bool], factor: float) -> Lines:
    return {
        phase: [
            replace(line, fixed_s=line.fixed_s * factor, whole_s=line.whole_s * factor) if s else line
            for line, s in zip(of_ranks, special, strict=True)
        ]
        for phase, of_ranks in lines.items()
    }


def room_of(plan: Plan, devices: tuple[Device, ...], memory_gb: float | None, found: Profile) -> Room:
    """What each rank may hold with `memory_gb` on devices that are no plain cpu, and its link."""
    limit = float("inf") if memory_gb is None else 1e9 * memory_gb
    sizes = profile.phase_bytes(plan)
    return Room(sizes, [float("inf") if device.kind == "cpu" else limit for device in devices], found.link_gb_s)


def _kernel_factory(llm: LLM) -> Callable[[], Kernels]:
    run, group, devices, form = llm.run, llm.group, llm.loaded.devices, llm.loaded.plan.body_format

    def new_kernels() -> Kernels:
        return on_device(bind_rank(run, group).kernels, devices, form, group)[0]

    return new_kernels


def decode_ms(llm: LLM, batch: int, new_tokens: int = _NEW_TOKENS) -> float:
    """Median time of a decode step of `batch` sequences, ms, of the slowest rank. Collective."""
    prompts = [[(7919 * i + 31 * b) % llm.config.vocab for i in range(_PROMPT_TOKENS)] for b in range(batch)]
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    gaps = token_gaps_ms(llm.generate(prompts, params)[0].token_times_s)
    return float(max(llm.group.all_gather_object(statistics.median(gaps[1:]))))  # the first gap has the recording


def tune_cached(
    load: Load,
    identity: dict[str, Any],
    group: Group,
    cache_dir: str,
    memory_gb: float | None = None,
    start: PhaseShares | None = None,
) -> PhaseShares:
    """Shares for a batch of one from the cache, or tuned and kept there. Collective; rank 0 reads and writes.

    `identity` is what was asked for, besides the hosts and the numbers here. Raises InputError as `tune` does.
    """
    mine = parse_devices(identity.get("device", ()), group.world_size)[group.rank]
    gpu = torch.cuda.get_device_name(mine.index) if mine.kind == "cuda" and torch.cuda.is_available() else ""
    hosts = group.all_gather_object([socket.gethostname(), extension.cpu_name(), os.cpu_count(), gpu])
    key = {**identity, "hosts": hosts, "comm": group.name, "memory_gb": memory_gb}
    path = Path(cache_dir).expanduser() / (
        hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24] + ".json"
    )
    known = group.broadcast_object(read(path, key) if group.rank == 0 else None)
    if known is not None:
        return PhaseShares(**{phase: tuple(map(Fraction, shares)) for phase, shares in known.items()})
    tuning = tune(load, (), 1, memory_gb, start)
    agreed(group, lambda: write(path, key, tuning.chosen) if group.rank == 0 else None)
    return tuning.chosen.shares


def read(path: Path, key: dict[str, Any]) -> dict[str, list[str]] | None:
    """The shares in a cache file; None without one for this key."""
    try:
        kept = json.loads(path.read_text())
        return dict(kept["shares"]) if kept["key"] == json.loads(json.dumps(key)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(path: Path, key: dict[str, Any], chosen: Candidate) -> None:
    """Keep a choice: written aside and renamed, so that nobody reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shares = {phase: [str(s) for s in of_ranks] for phase, of_ranks in asdict(chosen.shares).items()}
    times = {"predicted_ms": chosen.predicted_ms, "measured_ms": chosen.measured_ms}
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps({"key": key, "shares": shares, "name": chosen.name, **times}, indent=1))
    aside.replace(path)
