"""A SLURM of two nodes on this machine, in a temporary folder: munged, slurmctld and two slurmd, no systemd.

Both nodes are this machine under two names; they have their own ports and their own processes, so that one of
them can be taken away.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PATIENCE = 600
"""Seconds without an answer after which a node counts as lost: many, since the machine may be busy."""
LOST_AFTER = 10
"""The same, once a node has been taken away."""
_ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
}

_CONFIGURATION = """\
ClusterName=emu3-tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# Credentials that end soon: a requeued job waits for that.
AuthInfo=socket={folder}/munge.socket,cred_expire=15
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdTimeout={lost_after}
KillWait=5
MessageTimeout=100
BatchStartTimeout=300
UnkillableStepTimeout=600
MinJobAge=600
ReturnToService=2
JobRequeue=1
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Programs of SLURM and munge that this machine lacks."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class Cluster:
    """The daemons, and what tests ask of them."""

    def __init__(self) -> None:
        # Not pytest's folder: the path of a socket has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="emu3-slurm-"))
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))},
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
        }
        self._ports: list[int] = []
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start everything and wait until both nodes are idle."""
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._ports = _free_ports(3)
        self._configure(PATIENCE)
        files = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munged.pid",
            "seed-file": "seed",
        }
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._start("munged", "munged", "--foreground", "--force", *options)
        wait_until((self.folder / "munge.socket").exists, 200, "munged makes its socket")
        self._start("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self.wait_until_idle()

    def wait_until_idle(self) -> None:
        """Wait until both nodes can take a job."""
        wait_until(lambda: self._states() == {"idle"}, 600, "both nodes are idle", self.log_tails)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._start(node, "slurmd", "-D", "-N", node)

    def take_node_away(self, node: str) -> None:
        """End a node as a power cut does: its slurmd and everything that ran there, without a last word."""
        self._configure(LOST_AFTER)
        self.run("scontrol", "reconfigure")
        self._kill_node(node)

    def _kill_node(self, node: str) -> None:
        self._daemons.pop(node).kill()
        watchers: set[psutil.Process] = set()
        tasks: list[psutil.Process] = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                ours = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if ours and environment.get("SLURMD_NODENAME") == node:
                    tasks.append(process)
                    watchers.update(each for each in process.parents() if each.name() == "slurmstepd")
        # Those that would report the end of the tasks go first.
        for process in (*watchers, *tasks):
            with contextlib.suppress(psutil.Error):
                process.kill()

    def bring_node_back(self, node: str) -> None:
        """Start a node that was taken away, and wait until it can be used."""
        self._configure(PATIENCE)
        self.run("scontrol", "reconfigure")
        self.start_node(node)
        self.wait_until_idle()

    def stop(self) -> None:
        """End all daemons and every process of their jobs, and remove the folder."""
        self.run("scancel", "--full", "--signal=KILL", "--state=RUNNING", check=False)
        for node in NODES:
            if node in self._daemons:
                self._kill_node(node)
        for daemon in self._daemons.values():
            daemon.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str | Path, check: bool = True, **environment: str) -> str:
        """A program of SLURM, or a script that calls some; its standard output."""
        done = subprocess.run(
            [str(part) for part in command],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{command} ended with {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What scontrol says of a job."""
        text = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(\w+)=(\S*)", text.splitlines()[0]))

    def wait_for(self, number: str, timeout: float = 1500) -> str:
        """Wait until a job, or every task of an array, has ended for good; the state of all that agree."""
        states: set[str] = set()

        def ended() -> bool:
            lines = self.run("scontrol", "--oneliner", "show", "job", number).splitlines()
            states.clear()
            states.update(re.search(r"JobState=(\w+)", line).group(1) for line in lines)  # type: ignore[union-attr]
            return states <= _ENDED

        wait_until(ended, timeout, f"job {number} has ended", self.log_tails)
        return "/".join(sorted(states))

    def log_tails(self) -> str:
        """The ends of the daemons' logs, for messages."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in logs)

    def _configure(self, lost_after: int) -> None:
        text = _CONFIGURATION.format(
            folder=self.folder,
            user=getpass.getuser(),
            host=socket.gethostname().split(".")[0],
            ports=self._ports,
            lost_after=lost_after,
        )
        (self.folder / "slurm.conf").write_text(text)

    def _start(self, name: str, *command: str) -> None:
        self._daemons[name] = subprocess.Popen(
            command,
            env={**self.environment, "EMU3_TEST_DAEMON": name},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / f"{name}.stderr.log").open("wb"),
            start_new_session=True,
        )

    def _states(self) -> set[str]:
        return set(self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split())


def wait_until(
    condition: Callable[[], bool], timeout: float, what: str, details: Callable[[], str] = lambda: ""
) -> None:
    """Poll until `condition` holds; fail with `what` was waited for."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{timeout:.0f} s were not enough until {what}\n{details()}")
        time.sleep(0.3)


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on at present."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def main() -> None:
    """``python -m tests.slurm.cluster [COMMAND]``: a shell or a command in a cluster that ends with it."""
    if missing := missing_programs():
        sys.exit(f"error: no {', '.join(missing)} here; install slurm-wlm and munge")
    cluster = Cluster()
    try:
        cluster.start()
        sys.exit(subprocess.run(sys.argv[1:] or ["bash"], env=cluster.environment, check=False).returncode)
    finally:
        cluster.stop()


if __name__ == "__main__":
    main()
