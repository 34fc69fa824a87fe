"""Two hosts out of one machine: namespaces of their own, a cable between them, an sshd in each. Linux, root.

Each has its own network, host name, processes, /dev/shm and /etc/ssh, so that neither MPI nor ssh can tell that the
kernel is the same. Nothing is written outside the given directory, and nothing outlives the context.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

NETWORK = "192.168.231."
NEEDED = ("ip", "nsenter", "ssh", "ssh-keygen", "sshd", "unshare")

# Run as the first process of a host. The mounts are its own: the machine's directories stay as they are.
_BOOT = """set -eu
mount -t tmpfs -o size=8g tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind "$1/ssh" /etc/ssh
mount --bind "$1/hosts" /etc/hosts
hostname "$2"
ip link set lo up
exec sleep infinity
"""

_SSHD = """HostKey /etc/ssh/key
AuthorizedKeysFile /etc/ssh/key.pub
StrictModes no
UsePAM no
PidFile none
"""

_SSH = """IdentityFile /etc/ssh/key
UserKnownHostsFile /etc/ssh/known_hosts
StrictHostKeyChecking yes
LogLevel error
"""


def missing() -> str:
    """Why two hosts cannot be made here, or ""."""
    if os.geteuid():
        return "two hosts need root"
    lacking = [name for name in NEEDED if _find(name) is None]
    if lacking:
        return f"two hosts need {', '.join(lacking)}"
    tried = subprocess.run(
        [_tool("unshare"), "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True
    )
    return f"no namespaces: {tried.stderr.decode().strip()}" if tried.returncode else ""


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _tool(name: str) -> str:
    found = _find(name)
    assert found, name
    return found


@dataclass(frozen=True)
class Host:
    """One of the two."""

    name: str
    address: str
    pid: int  # of its first process, as the machine counts

    def command(self, *words: object) -> list[str]:
        """What runs `words` on this host, in the present directory."""
        enter = [_tool("nsenter"), "--target", str(self.pid), "--net", "--uts", "--mount", "--pid"]
        return [*enter, "env", "-C", os.getcwd(), *map(str, words)]

    def run(self, *words: object) -> str:
        """Standard output of a command that must succeed."""
        return subprocess.run(self.command(*words), check=True, capture_output=True, text=True, timeout=60).stdout

    def processes(self) -> list[psutil.Process]:
        """Those running here, without its first one and sshd. Nobody collects the dead: they do not count."""
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            try:
                here = os.readlink(f"/proc/{process.pid}/ns/pid") == space
                own = process.pid == self.pid or process.name() == "sshd"
                if here and not own and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (OSError, psutil.Error):
                continue
        return found

    def shm_files(self) -> list[str]:
        """Names in this host's /dev/shm."""
        return self.run("ls", "-A", "/dev/shm").split()

    def link(self, state: str) -> None:
        """Plug (`up`) or pull (`down`) the cable at this end."""
        self.run("ip", "link", "set", "eth0", state)


@contextmanager
def two_hosts(directory: Path) -> Iterator[tuple[Host, Host]]:
    """hosta and hostb, until the end of the context. `directory` is empty and takes keys and settings."""
    names = ("hosta", "hostb")
    ssh = directory / "ssh"
    ssh.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ssh / "key"], check=True)
    public = (ssh / "key.pub").read_text()
    (ssh / "known_hosts").write_text("".join(f"{name} {public}" for name in names))
    (ssh / "sshd_config").write_text(_SSHD)
    (ssh / "ssh_config").write_text(_SSH)
    addresses = {name: f"{NETWORK}{i + 1}" for i, name in enumerate(names)}
    hosts_file = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())
    (directory / "hosts").write_text(hosts_file)
    with ExitStack() as stack:
        a, b = (stack.enter_context(_host(directory, name, addresses[name])) for name in names)
        ends = ["eth0", "netns", str(a.pid), "type", "veth", "peer", "name", "eth0", "netns", str(b.pid)]
        subprocess.run([_tool("ip"), "link", "add", *ends], check=True)
        for host in (a, b):
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.link("up")
            host.run(_tool("sshd"))
        _wait_for_ssh(a, b)
        yield a, b


@contextmanager
def _host(directory: Path, name: str, address: str) -> Iterator[Host]:
    flags = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    starter = subprocess.Popen([_tool("unshare"), *flags, "sh", "-c", _BOOT, "sh", directory, name])
    try:
        end = time.monotonic() + 30
        while not (booted := [c for c in psutil.Process(starter.pid).children() if c.name() == "sleep"]):
            assert starter.poll() is None and time.monotonic() < end, f"{name} did not start"
            time.sleep(0.02)
        yield Host(name, address, booted[0].pid)
    finally:
        starter.kill()  # --kill-child: its first process goes too, and with that all others of the host
        starter.wait()


def _wait_for_ssh(a: Host, b: Host) -> None:
    end = time.monotonic() + 30
    while subprocess.run(a.command("ssh", "-o", "BatchMode=yes", b.name, "true"), capture_output=True).returncode:
        assert time.monotonic() < end, f"no ssh from {a.name} to {b.name}"
        time.sleep(0.2)


if __name__ == "__main__":  # python tests/support/two_hosts.py COMMAND ...: on hosta, hostb beside it
    import tempfile

    with tempfile.TemporaryDirectory() as path, two_hosts(Path(path)) as (first, _):
        sys.exit(subprocess.call(first.command(*sys.argv[1:])))
