"""Two hosts, each with a network of its own (two_hosts.sh): three ways to launch, a cut cable in the middle, and going on exactly.

Where network namespaces or the tools are not to be had the tests are skipped, and the summary says why.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.distributed.conftest import ROOT, losses, write_corpus

SCRIPT = str(ROOT / "tests" / "hosts" / "two_hosts.sh")
HOSTS = ("10.78.0.11", "10.78.0.12")
LIMIT, LOST = 180, 8  # seconds: a launch counts as hung; a host that is cut off counts as lost
STEPS = 12


def missing() -> str | None:
    """What this machine lacks for two hosts."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    absent = [tool for tool in ("ip", "sshd", "ssh", "pdsh") if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    if absent:
        return f"needs {', '.join(absent)} (apt-get install iproute2 openssh-server pdsh)"
    done = subprocess.run(["ip", "netns", "add", "burnish_probe"], capture_output=True, text=True)
    if done.returncode != 0:
        return f"network namespaces are not permitted here: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", "burnish_probe"], check=True)
    return None


REASON = missing()
pytestmark = [pytest.mark.distributed, pytest.mark.skipif(REASON is not None, reason=f"two hosts: {REASON}")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a recipe, and two hosts that see it."""
    folder = tmp_path_factory.mktemp("hosts")
    recipe = {
        "run": {"folder": str(folder / "runs"), "lost_seconds": LOST},
        "model": {"width": 36, "depth": 2, "heads": 2, "mlp_width": 75},
        "data": {
            "source": "files", "paths": [str(write_corpus(folder))], "validation_fraction": 0.1,
            "prepared": str(folder / "prepared"), "tokenizer": {"vocab_size": 401},
        },
        "training": {"tokens": STEPS * 768, "tokens_per_step": 768, "micro_batch_size": 2, "sequence_length": 64, "precision": "fp32"},
        "optimizer": {"learning_rate": 3e-3},
        "evaluation": {"every": 1000, "tokens": 64},
        "checkpoint": {"every": 2},
        "logging": {"every": 1, "tensorboard": False, "outliers_every": 0},
        "deepspeed": {"zero_optimization": {"stage": 3}},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    subprocess.run([SCRIPT, "down"], capture_output=True)  # of a test that was killed
    subprocess.run([SCRIPT, "up", str(folder)], check=True, capture_output=True, timeout=60)
    yield folder
    subprocess.run([SCRIPT, "down"], check=True)


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "eth0", **more}


def start_on(host: int, *command: str, **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [SCRIPT, "on", str(host), *command], cwd=ROOT, env=environment(**more), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(*processes: subprocess.Popen) -> str:
    output = ""
    for process in processes:
        output += process.communicate(timeout=LIMIT)[0]
    assert [process.returncode for process in processes] == [0] * len(processes), output[-5000:]
    return output


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    until = time.monotonic() + LIMIT
    while time.monotonic() < until and process.poll() is None:
        if (run / "metrics.jsonl").exists() and step in losses(run):
            return
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not reached: {process.communicate(timeout=30)[0]}")


def test_deepspeed_is_cut_torchrun_goes_on_and_srun_ends_it(place: Path) -> None:
    """One run, launched three ways; its losses are those of a run on one host that nobody disturbed, to float32 rounding."""
    recipe, run = str(place / "recipe.yaml"), place / "runs" / "moved"

    # deepspeed --hostfile over pdsh; the second rank is held up in step 6, the cable is pulled, and nothing moves any more
    with open(place / "deepspeed_env", "a") as file:
        file.write("BURNISH_FAULTS=hang@6:1\n")
    command = f". {place}/env && exec {sys.executable} -m deepspeed.launcher.runner --hostfile {place}/hostfile --no_ssh_check"
    command += f" --master_addr {HOSTS[0]} train.py {recipe} run.name=moved"
    launcher = subprocess.Popen(
        ["bash", "-c", command], cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_for_step(run, 5, launcher)
    subprocess.run([SCRIPT, "cut", "2"], check=True)
    cut = time.monotonic()
    output = launcher.communicate(timeout=LIMIT)[0]
    seconds = time.monotonic() - cut
    print(f"the launch ended {seconds:.0f} s after the cut, run.lost_seconds={LOST}")
    assert launcher.returncode != 0
    assert re.search(rf"error: stopped: no sign of life for {LOST} s from rank 1 on .*{re.escape(HOSTS[1])}", output), output[-5000:]
    subprocess.run([SCRIPT, "mend", "2"], check=True)

    # torchrun, whose agents find one another at a rendezvous; the first is told that it serves it, since its name resolves to loopback
    begin = [sys.executable, "-m", "torch.distributed.run"]
    rendezvous = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint={HOSTS[0]}:29555", "--rdzv_id=moved"]
    agents = [
        start_on(host, *begin, *rendezvous, f"--rdzv_conf=is_host={int(host == 1)}", f"--local_addr={HOSTS[host - 1]}",
                 "train.py", recipe, "run.name=moved", "run.stop_at_step=8")
        for host in (1, 2)
    ]  # fmt: skip
    assert "from step 4," in finish(*agents)

    # what srun tells its tasks
    step = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "4711", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    tasks = [
        start_on(host, sys.executable, "train.py", recipe, "run.name=moved",
                 **step, SLURM_PROCID=str(host - 1), SLURM_STEP_NODELIST=",".join(HOSTS))
        for host in (1, 2)
    ]  # fmt: skip
    assert "from step 8," in finish(*tasks)

    finish(subprocess.Popen([sys.executable, "train.py", recipe, "run.name=undisturbed"], cwd=ROOT,
                            env={k: v for k, v in environment().items() if k != "GLOO_SOCKET_IFNAME"},
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))  # fmt: skip
    undisturbed = losses(place / "runs" / "undisturbed")
    assert sorted(undisturbed) == list(range(1, STEPS + 1))
    assert losses(run) == pytest.approx(undisturbed, rel=2e-6)
