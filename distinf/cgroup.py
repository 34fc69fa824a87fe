"""CPU time and CPUs that control groups leave to this process, of either version; `root` as in `topology`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from distinf.topology import parse_cpu_list, read_text

ROOT = Path("/")


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPU time that the groups around this process allow, in cores; None without a limit."""
    limits = []
    for group in _groups("cpu", root):
        v1 = read_text(group / "cpu.cfs_quota_us"), read_text(group / "cpu.cfs_period_us")
        quota, _, period = (read_text(group / "cpu.max") or " ".join(v1)).partition(" ")
        if quota not in ("", "max", "-1"):
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def cpuset(root: Path = ROOT) -> set[int]:
    """CPUs of the innermost group that has a cpuset; empty where none has."""
    for group in _groups("cpuset", root):
        if text := read_text(group / "cpuset.cpus.effective") or read_text(group / "cpuset.effective_cpus"):
            return parse_cpu_list(text)
    return set()


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of this process's group and of those around it, innermost first.

    In a container the paths of /proc may be the host's, and the folders may not exist; the outermost is then its own.
    """
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Version 2 has one tree for all controllers (no name), which is at "unified" beside those of version 1.
        for mount in [controller] if controllers else ["", "unified"]:
            parts = Path(path).parts[1:]
            for depth in range(len(parts), -1, -1):
                yield (root / "sys/fs/cgroup" / mount).joinpath(*parts[:depth])
