"""The same sweep on a real SLURM cluster of one node, which the test starts and stops; needs root and two packages."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sweep_pool import check_scenario

from oodlib.project import root
from oodlib.vits.launch import Resources

DAEMONS = ("munged", "slurmctld", "slurmd")
SEARCHED = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=SEARCHED) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"no SLURM here ({', '.join(MISSING)}): apt-get install slurm-wlm munge"),
    pytest.mark.skipif(sys.platform != "win32" and os.geteuid() != 0, reason="SLURM's daemons need root"),
]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _answers(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, timeout=30).returncode == 0


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One node with the cores of this machine, without accounting; everything it writes lies in the test's folder."""
    monkeypatch.setenv("PATH", SEARCHED)
    host = socket.gethostname().partition(".")[0]
    home, munge = tmp_path / "slurm", tmp_path / "munge"
    for folder in (home / "state", home / "spool", munge):
        folder.mkdir(parents=True)
    key, sock = munge / "key", munge / "socket"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    (home / "slurm.conf").write_text("\n".join([
        "ClusterName=oodlib", f"SlurmctldHost={host}", f"SlurmctldPort={_free_port()}", f"SlurmdPort={_free_port()}",
        "SlurmUser=root", "AuthType=auth/munge", "MpiDefault=none", "ReturnToService=2",
        f"AuthInfo=socket={sock},cred_expire=6",             # a requeued job waits as long as a credential lives
        f"StateSaveLocation={home}/state", f"SlurmdSpoolDir={home}/spool", f"SlurmctldPidFile={home}/ctld.pid",
        f"SlurmdPidFile={home}/slurmd.pid", "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none", "AccountingStorageType=accounting_storage/none",
        "SelectType=select/cons_tres", "SelectTypeParameters=CR_Core", "MinJobAge=10", "KillWait=2",
        f"NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN",
        "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP", ""]))
    monkeypatch.setenv("SLURM_CONF", str(home / "slurm.conf"))
    # --force: a temporary folder that others may not look into will do
    commands = (["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={sock}",
                 f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"],
                ["slurmctld", "-D", "-i"], ["slurmd", "-D"])
    running: list[subprocess.Popen[bytes]] = []
    logs = tmp_path / "daemons.log"
    try:
        with open(logs, "wb") as log:
            for command in commands:
                running.append(subprocess.Popen(command, stdout=log, stderr=log))
                for _ in range(50):
                    if command[0] != "munged" or sock.exists():
                        break
                    time.sleep(0.1)
        for _ in range(100):
            if _answers("srun", "--immediate=1", "true"):
                break
            time.sleep(0.2)
        else:
            pytest.skip(f"SLURM's daemons do not work here: {logs.read_text(errors='replace')[-1500:]}")
        yield tmp_path
    finally:
        subprocess.run(["scancel", "--user=root", "--signal=KILL"], capture_output=True)
        for process in reversed(running):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def test_a_rerun_on_slurm_does_only_what_was_killed_or_failed(cluster: Path, monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit", reason="needs submitit (pip install 'oodlib[sweep]')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(root())]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = cluster / "sweep"
    check_scenario(output, "slurm", Resources(at_once=2, timeout=60), capsys, poll=0.5, broken="SIGUSR2")
    logs = [path.read_text() for path in (output / "logs").rglob("*.err")]
    assert sum("this job is preempted" in text for text in logs) == 1          # broken/odd: requeued, then done
    assert not (output / "traps" / "broken").exists()
