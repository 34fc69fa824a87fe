"""launch/mpirun.sh: what each launcher is given, what is run, and one line for each mistake. No MPI is started."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parent.parent / "launch"

VERSIONS = {
    "intel": "Intel(R) MPI Library for Linux* OS, Version 2021.18.1 Build 20260626\nCopyright 2003-2026",
    "mpich": "HYDRA build details:\n    Version:                                 4.2.0",
    "openmpi": "mpirun (Open MPI) 4.1.4\n\nReport bugs to the project",
}
# Prints what it was called with, a zero byte behind each word, so that no quoting can hide.
LAUNCHER = """#!/usr/bin/env bash
if [[ ${1-} == --version ]]; then cat "$0.version"; else printf '%s\\0' "$0" "$@"; fi
"""
CORES = 4
NEEDED = ("bash", "cat", "dirname", "env", "grep", "readlink", "sed", "sort", "wc")
AS_ROOT = ["--allow-run-as-root"] if os.geteuid() == 0 else []
SSH = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=2 -o ServerAliveCountMax=3"


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@dataclass
class Result:
    status: int
    stdout: str
    stderr: str

    @property
    def words(self) -> list[str]:
        """What was started, word by word."""
        assert self.status == 0, self.stderr
        return self.stdout.split("\0")[:-1]


class House:
    """A repository with launch/ alone, a PATH with nothing but the named tools, and hosts node1 to node9."""

    def __init__(self, root: Path) -> None:
        self.root = root / "a house"
        self.env = {"PATH": str(self.root / "bin"), "HOME": str(root), "LC_ALL": "C"}
        shutil.copytree(LAUNCH, self.root / "launch")
        (self.root / "bin").mkdir()
        for name in NEEDED:
            found = shutil.which(name)
            assert found, name
            (self.root / "bin" / name).symlink_to(found)
        script(self.root / "bin/getent", "#!/usr/bin/env bash\n[[ $2 == node? || $2 == localhost ]]\n")
        cores = "\\n".join(f"{core},0" for core in range(CORES) for _ in range(2))
        script(self.root / "bin/lscpu", f"#!/usr/bin/env bash\nprintf '# CORE,SOCKET\\n{cores}\\n'\n")
        self.distinf = self.tool("bin/distinf")

    def tool(self, path: str) -> str:
        return str(script(self.root / path, "#!/usr/bin/env bash\n"))

    def launcher(self, family: str, path: str = "mpi/mpirun") -> str:
        script(self.root / f"{path}.version", VERSIONS[family])
        return str(script(self.root / path, LAUNCHER))

    def hostfile(self, text: str) -> str:
        (self.root / "hosts.txt").write_text(text)
        return "hosts.txt"

    def run(self, *words: object, **env: str) -> Result:
        command = [str(self.root / "launch/mpirun.sh"), *map(str, words)]
        done = self.start(command, env)
        if done.status == 0 and done.stderr:  # the printed line, given to a shell, does the same
            assert self.start(["bash", "-c", done.stderr], env).stdout == done.stdout
        return done

    def start(self, command: list[str], env: dict[str, str]) -> Result:
        done = subprocess.run(command, env=self.env | env, cwd=self.root, capture_output=True, text=True, timeout=60)
        return Result(done.returncode, done.stdout, done.stderr)

    def translated(self, family: str, *words: object, **env: str) -> list[str]:
        """The launcher's words between its own name and `-n N distinf info`."""
        launcher = self.launcher(family)
        started = self.run("--mpirun", launcher, *words, "--", "info", **env).words
        assert started[0] == launcher
        assert started[-4] == "-n" and started[-2:] == [self.distinf, "info"]
        return started[1:-4]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def openmpi(*words: str, first: tuple[str, ...] = ()) -> list[str]:
    return [*first, "--bind-to", "none", *words, *AS_ROOT]


@pytest.mark.parametrize(
    ("family", "flags", "expected"),
    [
        ("intel", ["-n", 2], []),
        ("mpich", ["-n", 2], []),
        ("openmpi", ["-n", 2], openmpi()),
        ("openmpi", ["-n", CORES], openmpi()),
        ("openmpi", ["-n", CORES + 1], openmpi("--map-by", ":OVERSUBSCRIBE")),
        ("intel", ["-n", 8, "-ppn", 2], ["-ppn", "2"]),
        ("mpich", ["-n", 8, "-ppn", 2], ["-ppn", "2"]),
        ("openmpi", ["-n", 8, "-ppn", 2], openmpi("--map-by", "ppr:2:node")),
        ("openmpi", ["-ppn", 5, "-n", 5], openmpi("--map-by", "ppr:5:node:OVERSUBSCRIBE")),
        # The launcher's own options go through as they are, and are not contradicted.
        ("intel", ["-genv", "A", "b c", "-n", 2], ["-genv", "A", "b c"]),
        ("openmpi", ["--bind-to", "core", "-n", 2], [*AS_ROOT, "--bind-to", "core"]),
    ],
)
def test_ranks(house: House, family: str, flags: list[object], expected: list[str]) -> None:
    assert house.translated(family, *flags) == expected


EVEN = "# a comment\nnode1\n\n  # another\nnode2\n"
UNEVEN = "node1:3\nnode2:2"  # and no newline at the end


@pytest.mark.parametrize(
    ("family", "text", "flags", "expected"),
    [
        ("intel", EVEN, ["-n", 4], ["-f", "hosts.txt", "-ppn", "2"]),
        ("mpich", EVEN, ["-n", 3], ["-f", "hosts.txt", "-ppn", "2"]),
        ("openmpi", EVEN, ["-n", 4], openmpi(first=("--host", "node1:2,node2:2"))),
        ("intel", EVEN, ["-n", 2, "-ppn", 2], ["-f", "hosts.txt", "-ppn", "2"]),
        ("openmpi", EVEN, ["-n", 2, "-ppn", 2], openmpi(first=("--host", "node1:2,node2:2"))),
        ("intel", UNEVEN, ["-n", 5], ["-machinefile", "hosts.txt"]),
        ("mpich", UNEVEN, ["-n", 5], ["-f", "hosts.txt"]),
        ("openmpi", UNEVEN, ["-n", 4], openmpi(first=("--host", "node1:3,node2:2"))),
        ("openmpi", EVEN, ["-n", 10], openmpi("--map-by", ":OVERSUBSCRIBE", first=("--host", "node1:5,node2:5"))),
    ],
)
def test_hosts(house: House, family: str, text: str, flags: list[object], expected: list[str]) -> None:
    assert house.translated(family, "-f", house.hostfile(text), *flags) == expected


@pytest.mark.parametrize("name", ["local.txt", "4x2.txt", "4x2-gpu.txt"])
def test_the_example_hostfiles_are_understood(house: House, name: str) -> None:
    ranks = {"local.txt": 2, "4x2.txt": 8, "4x2-gpu.txt": 9}[name]
    hosts = {
        "local.txt": "localhost:2",
        "4x2.txt": "node1:2,node2:2,node3:2,node4:2",
        "4x2-gpu.txt": "node1:3,node2:2,node3:2,node4:2",
    }[name]
    words = house.translated("openmpi", "-n", ranks, "-f", LAUNCH.parent / "hostfiles" / name)
    assert words == openmpi(first=("--host", hosts))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("intel", "I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS"),
        ("mpich", "HYDRA_LAUNCHER_EXTRA_ARGS"),
        ("openmpi", "PRTE_MCA_plm_ssh_args"),
    ],
)
def test_ssh_does_not_wait_for_ever(house: House, family: str, name: str) -> None:
    """Set for other hosts only, not in a batch system, never over the user's own value, and always printed."""
    launcher = house.launcher(family)
    Path(launcher).write_text(f'#!/usr/bin/env bash\n[[ $1 == --version ]] && cat "$0.version" || echo "<${name}>"\n')
    local = ["--mpirun", launcher, "-n", 2]
    remote = [*local, "-f", house.hostfile(EVEN)]
    done = house.run(*remote, "--", "info")
    assert done.stdout == f"<{SSH}>\n" and f"'{name}={SSH}'" in done.stderr
    for done in (house.run(*local, "--", "info"), house.run(*remote, "--", "info", SLURM_JOB_ID="1")):
        assert done.stdout == "<>\n" and name not in done.stderr
    done = house.run(*remote, "--", "info", **{name: "-p 2222"})
    assert done.stdout == "<-p 2222>\n" and f"{name}=" not in done.stderr


def test_words_arrive_as_they_were_given(house: House) -> None:
    prompt = ["generate", "--prompt", 'What\'s "the"  $HOME of `France`?', "", "--", "-n", "a\nb", "*"]
    words = house.run("--mpirun", house.launcher("mpich"), "-n", 2, "--", *prompt).words
    assert words == [house.launcher("mpich"), "-n", "2", house.distinf, *prompt]


def test_what_is_run(house: House) -> None:
    launcher = house.launcher("mpich")

    def program(*words: str, **env: str) -> list[str]:
        return house.run("--mpirun", launcher, "-n", 2, "--", *words, **env).words[3:]

    # A bare word is distinf's even if a program is called so.
    house.tool("bin/info")
    assert program("info") == [house.distinf, "info"]
    own = house.tool("bin/own program")
    assert program("bin/own program", "x") == ["bin/own program", "x"] and program(own) == [own]
    # python: the one on PATH, else of the active environment, else of the repository's own.
    on_path = house.tool("bin/python3")
    assert program("python", "-m", "pytest") == [on_path, "-m", "pytest"]
    active = house.tool("venv/bin/python")
    environment = str(house.root / "venv")
    assert program("python", "x.py", VIRTUAL_ENV=environment) == [active, "x.py"]
    repository = house.tool(".venv/bin/python")
    assert program("python", "x.py", VIRTUAL_ENV=environment) == [repository, "x.py"]
    assert program("info", VIRTUAL_ENV=environment) == [house.distinf, "info"]
    house.distinf = house.tool(".venv/bin/distinf")
    assert program("info") == [house.distinf, "info"]


def test_a_link_to_it_works(house: House) -> None:
    link = house.root / "elsewhere/start"
    link.parent.mkdir()
    link.symlink_to(house.root / "launch/mpirun.sh")
    done = house.start([str(link), "--mpirun", house.launcher("mpich"), "-n", "1", "--", "info"], {})
    assert done.words[1:] == ["-n", "1", house.distinf, "info"]


def test_which_launcher(house: House) -> None:
    def launcher(*words: str, **env: str) -> str:
        return house.run("-n", 1, *words, "--", "info", **env).words[0]

    on_path = house.launcher("mpich", "bin/mpiexec")
    assert launcher() == on_path
    on_path = house.launcher("mpich", "bin/mpirun")
    assert launcher() == on_path
    active = house.launcher("mpich", "venv/bin/mpirun")
    environment = str(house.root / "venv")
    assert launcher(VIRTUAL_ENV=environment) == active
    own = house.launcher("mpich", ".venv/bin/mpirun")
    assert launcher(VIRTUAL_ENV=environment) == own
    assert launcher("--mpirun", on_path, VIRTUAL_ENV=environment) == on_path
    assert launcher("--mpirun", "mpiexec") == str(house.root / "bin/mpiexec")


def test_intel_is_started_without_its_shell_script(house: House) -> None:
    """SIGTERM would end the script and leave the ranks; it is kept where it has work to do."""
    house.launcher("intel")
    hydra = house.launcher("intel", "mpi/mpiexec.hydra")
    start = ["--mpirun", "mpi/mpirun", "-n", 2, "--", "info"]
    assert house.run(*start).words[0] == hydra
    for env in ({"PBS_NODEFILE": "x"}, {"LSB_JOBID": "1"}):
        done = house.run(*start, **env)
        assert done.words[0] == "mpi/mpirun"
        assert shlex.split(done.stderr)[:2] == ["env", f"PATH={house.root}/mpi:{house.env['PATH']}"]


def test_help_tells_the_form(house: House) -> None:
    done = house.run("--help")
    assert done.status == 0 and "-n 2" in done.stdout and "--" in done.stdout and not done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--", "info"], "-n is missing"),
        (["-n"], "-n needs a value"),
        (["-n", "--", "info"], "-n needs a value"),
        (["-n", "0", "--", "info"], "-n must be a positive number, got '0'"),
        (["-n", "-2", "--", "info"], "got '-2'"),
        (["-n", "two", "--", "info"], "got 'two'"),
        (["-n", "1.5", "--", "info"], "got '1.5'"),
        (["-n", "2", "-ppn", "x", "--", "info"], "-ppn must be a positive number, got 'x'"),
        ([], "nothing to run"),
        (["-n", "2"], "nothing to run"),
        (["-n", "2", "info"], "nothing to run"),
        (["-n", "2", "--"], "nothing to run"),
        (["-n", "2", "-f", "missing.txt", "--", "info"], "-f missing.txt: no such file"),
        (["-n", "2", "-f", ".", "--", "info"], "-f .: no such file"),
        (["-n", "2", "--", "./missing"], "./missing: no such executable"),
        (["-n", "2", "--mpirun", "missing/mpirun", "--", "info"], "missing/mpirun: no such executable"),
        (["-n", "2", "--mpirun", "cat", "--", "info"], "is not Intel MPI, MPICH or Open MPI"),
        (["-n", "2", "--", "info"], "no MPI launcher"),
        (["-n", "2", "--", "python", "x.py"], "python not found"),
    ],
)
def test_a_mistake_is_one_line(house: House, words: list[str], said: str) -> None:
    expect_error(house.run(*words), said)


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        ("node1\nnowhere\n", ["-n", 2], "unknown host 'nowhere'"),
        ("node1 slots=2\n", ["-n", 2], "expected 'host' or 'host:ranks', got 'node1 slots=2'"),
        ("node1 # first\n", ["-n", 1], "got 'node1 # first'"),
        ("node1:0\n", ["-n", 1], "got 'node1:0'"),
        ("# none\n\n", ["-n", 1], "names no host"),
        ("node1\nnode1\n", ["-n", 2], "host 'node1' is there twice"),
        ("node1:2\nnode2\n", ["-n", 3], "on every line or on none"),
        ("node1:2\nnode2:2\n", ["-n", 5], "-n 5: hosts.txt has room for 4 ranks"),
        ("node1\nnode2\n", ["-n", 5, "-ppn", 2], "-n 5: hosts.txt with -ppn 2 has room for 4 ranks"),
        ("node1:2\nnode2:2\n", ["-n", 4, "-ppn", 2], "-ppn 2: hosts.txt already says"),
    ],
)
def test_a_bad_hostfile_is_one_line(house: House, text: str, flags: list[object], said: str) -> None:
    words = ["--mpirun", house.launcher("mpich"), "-f", house.hostfile(text), *flags]
    expect_error(house.run(*words, "--", "info"), said)


def test_a_missing_distinf_is_one_line(house: House) -> None:
    Path(house.distinf).unlink()
    expect_error(house.run("--mpirun", house.launcher("mpich"), "-n", 1, "--", "info"), "distinf not found")


def expect_error(done: Result, said: str) -> None:
    assert done.status == 2 and done.stdout == ""
    assert done.stderr.startswith("mpirun.sh: ") and done.stderr.endswith("\n") and done.stderr.count("\n") == 1
    assert said in done.stderr
