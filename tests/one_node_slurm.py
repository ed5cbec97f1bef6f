"""A real Slurm cluster of one node, this machine, for as long as a test needs it: slurmctld, slurmd and nothing else.

Needs Debian's packages slurmctld, slurmd and slurm-client. No munge and no accounting: nobody else can reach the ports.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "sinfo", "scontrol")
CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=2048 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
MpiDefault=none
"""


def installed():
    return all(map(shutil.which, PROGRAMS))


def free_ports(n):
    """`n` ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


@contextlib.contextmanager
def cluster(folder):
    """Run the cluster with its files in `folder`; yields an environment with its SLURM_CONF. Its partition is `test`.

    Raises RuntimeError with the end of the logs where the node is not idle after 30 seconds.
    """
    (folder / "state").mkdir(parents=True)
    (folder / "spool").mkdir()
    values = dict(host=socket.gethostname().split(".")[0], cpus=os.cpu_count(), folder=folder, ports=free_ports(2))
    user = subprocess.check_output(["id", "-un"], text=True).strip()
    (folder / "slurm.conf").write_text(CONFIG.format(user=user, **values))
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    quiet = dict(env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with contextlib.ExitStack() as stack:
        for program in ("slurmctld", "slurmd"):  # -D: in the foreground, so that they end with the test
            daemon = stack.enter_context(subprocess.Popen([program, "-D"], **quiet))
            stack.callback(daemon.terminate)
        deadline, state = time.time() + 30, ""
        while not state.startswith("idle"):
            if time.time() > deadline:
                logs = "\n".join(p.read_text()[-1500:] for p in sorted(folder.glob("*.log")))
                raise RuntimeError(f"the node is {state or 'unknown'}, not idle, after 30 s:\n{logs}")
            time.sleep(0.5)
            state = subprocess.run(
                ["sinfo", "-h", "-o", "%t"], env=environment, capture_output=True, text=True
            ).stdout.strip()
        yield environment
