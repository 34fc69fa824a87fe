"""What the tuner found, as JSON and as text."""

from __future__ import annotations

from typing import Any

from distinf.hetero.tune import Candidate, Tuning
from distinf.shard import PhaseShares


def tuning_report(tuning: Tuning) -> dict[str, Any]:
    """The JSON object of `distinf tune`: times in milliseconds."""

    def one(candidate: Candidate) -> dict[str, Any]:
        parts = {phase: [str(s) for s in shares] for phase, shares in vars(candidate.shares).items()}
        return {**vars(candidate), "shares": parts}

    return {
        "batch": tuning.batch,
        "devices": [str(device) for device in tuning.devices],
        "chosen": one(tuning.chosen),
        "candidates": [one(candidate) for candidate in tuning.candidates],
        "rest_ms": tuning.rest_ms,
        "reduce_ms": {rows: 1e3 * s for rows, s in tuning.profile.reduce_s.items()},
        "profile": {
            rows: {
                phase: [{"fixed_ms": 1e3 * line.fixed_s, "whole_ms": 1e3 * line.whole_s} for line in of_ranks]
                for phase, of_ranks in lines.items()
            }
            for rows, lines in tuning.profile.lines.items()
        },
    }


def tuning_text(tuning: Tuning) -> str:
    """What was measured, considered and chosen."""
    lines = [f"rank {rank}: {device}" for rank, device in enumerate(tuning.devices)]
    lines += ["", "time of a share w of one layer (vocab: of the head), ms:"]
    for rows, phases in tuning.profile.lines.items():
        for phase, of_ranks in phases.items():
            parts = "  ".join(f"{1e3 * line.fixed_s:8.3f} + {1e3 * line.whole_s:8.3f} w" for line in of_ranks)
            lines.append(f"{rows:5} rows  {phase:<10} {parts}")
        lines.append(f"{rows:5} rows  reduction  {1e3 * tuning.profile.reduce_s[rows]:8.3f}")
    lines += ["", f"ms/token, batch {tuning.batch}; {tuning.rest_ms:.3f} ms of it outside GEMMs and reductions:"]
    for candidate in tuning.candidates:
        measured = "not tried" if candidate.measured_ms is None else f"measured {candidate.measured_ms:9.3f}"
        mark = "  <- chosen" if candidate is tuning.chosen else ""
        lines.append(f"  {candidate.name:<28} predicted {candidate.predicted_ms:9.3f}  {measured}{mark}")
    return "\n".join([*lines, *(f"  {text}" for text in phase_texts(tuning.chosen.shares))])


def phase_texts(shares: PhaseShares) -> list[str]:
    """Each phase with every rank's part of 1."""
    return [
        " ".join([phase, *(f"{float(s / sum(of_ranks)):.4f}" for s in of_ranks)])
        for phase, of_ranks in vars(shares).items()
    ]
