"""The same sweep on a real SLURM cluster of one node, which the test starts and stops; needs root
and two packages.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sweep_pool import check_scenario

from oodlib.studies.vits.sweep.launch import Resources
from oodlib.workspace import root

DAEMONS = ("munged", "slurmctld", "slurmd")
SEARCHED = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=SEARCHED) is None]
pytestmark = [
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"no SLURM here ({', '.join(MISSING)}): apt-get install slurm-wlm munge",
    ),
    pytest.mark.skipif(
        sys.platform != "win32" and os.geteuid() != 0, reason="SLURM's daemons need root"
    ),
]


@contextlib.contextmanager
def one_node_slurm(folder: Path) -> Iterator[dict[str, str]]:
    """A cluster of this machine alone, without accounting; everything it writes lies in ``folder``.

    Yields the environment in which SLURM's commands find it.
    """
    host = socket.gethostname().partition(".")[0]
    home, munge = folder / "slurm", folder / "munge"
    for path in (home / "state", home / "spool", munge):
        path.mkdir(parents=True)
    key, sock = munge / "key", munge / "socket"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    (home / "slurm.conf").write_text(
        "\n".join(
            [
                "ClusterName=oodlib",
                f"SlurmctldHost={host}",
                f"SlurmctldPort={_free_port()}",
                f"SlurmdPort={_free_port()}",
                "SlurmUser=root",
                "AuthType=auth/munge",
                "MpiDefault=none",
                "ReturnToService=2",
                # a requeued job waits as long as a credential lives
                f"AuthInfo=socket={sock},cred_expire=6",
                f"StateSaveLocation={home}/state",
                f"SlurmdSpoolDir={home}/spool",
                f"SlurmctldPidFile={home}/ctld.pid",
                f"SlurmdPidFile={home}/slurmd.pid",
                "ProctrackType=proctrack/linuxproc",
                "TaskPlugin=task/none",
                "JobAcctGatherType=jobacct_gather/none",
                "AccountingStorageType=accounting_storage/none",
                "SelectType=select/cons_tres",
                "SelectTypeParameters=CR_Core",
                f"NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN",
                "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
                "",
            ]
        )
    )
    environment = {"PATH": SEARCHED, "SLURM_CONF": str(home / "slurm.conf")}
    # --force: a temporary folder that others may not look into will do
    commands = (
        [
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={sock}",
            f"--pid-file={munge}/pid",
            f"--log-file={munge}/log",
            f"--seed-file={munge}/seed",
        ],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D"],
    )
    everything, running = {**os.environ, **environment}, []
    try:
        with open(folder / "daemons.log", "wb") as log:
            for command in commands:
                running.append(subprocess.Popen(command, stdout=log, stderr=log, env=everything))
                _wait(sock.exists, seconds=5)
        srun = ["srun", "--immediate=1", "true"]
        _wait(
            lambda: subprocess.run(srun, capture_output=True, env=everything).returncode == 0,
            seconds=20,
        )
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], capture_output=True, env=everything)
        squeue = ["squeue", "--noheader"]  # daemons that go first would leave their jobs behind
        with contextlib.suppress(TimeoutError):
            _wait(
                lambda: not subprocess.run(squeue, capture_output=True, env=everything).stdout,
                seconds=20,
            )
        for process in reversed(running):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _wait(condition: Callable[[], bool], *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.1)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with contextlib.ExitStack() as stack:
        try:
            environment = stack.enter_context(one_node_slurm(tmp_path))
        except TimeoutError:
            log = (tmp_path / "daemons.log").read_text(errors="replace")
            pytest.skip(f"SLURM's daemons do not work here: {log[-1500:]}")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield tmp_path


@pytest.mark.slow
def test_a_rerun_on_slurm_does_only_what_was_killed_or_failed(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit", reason="needs submitit (pip install 'oodlib[sweep]')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(root())]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = cluster / "sweep"
    check_scenario(
        output, "slurm", Resources(at_once=2, timeout=60), capsys, poll=0.5, broken="SIGUSR2"
    )
    logs = [path.read_text() for path in (output / "logs").rglob("*.err")]
    assert (
        sum("this job is preempted" in text for text in logs) == 1
    )  # broken/odd: requeued, then done
    assert not (output / "traps" / "broken").exists()
