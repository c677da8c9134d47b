"""What is wrong with this machine, before a run finds out: `python -m scripts.doctor [--run FOLDER] [--hostfile FILE]`.

Prints a line for each thing that was looked at: `ok`, `note` (works, but know this), or `fix` with what to do. Exit code 1 when there is
something to fix. Run it on each host (`srun -N 2 --ntasks-per-node=1 python -m scripts.doctor --run /shared/runs --hosts 2`): given
--hosts it also sees whether the folder is one and the same for all of them, and compares their clocks.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import socket
import sys
import time
import uuid
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "pydantic", "sentencepiece", "safetensors")
CLOCK_SECONDS = 2.0  # between hosts: more makes logs hard to read; Burnish itself orders nothing by clocks


class Finding(NamedTuple):
    """One line of the report."""

    verdict: Literal["ok", "note", "fix"]
    subject: str
    text: str


def python_and_packages() -> list[Finding]:
    """Versions, beside those that the repository is tested with."""
    version = ".".join(map(str, sys.version_info[:3]))
    good = (3, 11) <= sys.version_info[:2] < (3, 14)
    found = [Finding("ok" if good else "fix", "python", version if good else f"{version}: use Python 3.11, 3.12 or 3.13")]
    tested = dict(line.strip().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line.count("==") == 1)
    for package in PACKAGES:
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding("fix", package, "not installed: make setup"))
            continue
        pinned = tested.get(package, "").split(" ")[0]
        same = not pinned or installed.split("+")[0] == pinned
        found.append(Finding("ok" if same else "note", package, installed if same else f"{installed}, tested with {pinned}"))
    return found


def accelerators() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        text = "none seen by torch; training uses the CPU"
        return [Finding("note", "accelerators", f"{text}, though this torch is built for {built}: look at nvidia-smi" if built else text)]
    found = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        busy = free < 0.9 * total
        name = f"{torch.cuda.get_device_name(number)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        found.append(Finding("note" if busy else "ok", f"accelerator {number}", name + (": another process uses it" if busy else "")))
    return found


def addresses_of(name: str) -> list[str]:
    """Addresses that a name resolves to; none where it does not."""
    try:
        return sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None)})
    except OSError:
        return []


def network(hostfile: Path | None) -> list[Finding]:
    """Names that other hosts cannot use, and a port that can be had."""
    names = [socket.gethostname()]
    if hostfile is not None:
        lines = [line.split("#")[0].split() for line in hostfile.read_text().splitlines()]
        names += [words[0] for words in lines if words]
    found = []
    for name in names:
        addresses = addresses_of(name)
        if not addresses:
            found.append(Finding("fix", f"host {name}", "does not resolve: add it to /etc/hosts or DNS, or use its address"))
        elif all(address.startswith("127.") or address == "::1" for address in addresses):
            verdict = "note" if name == names[0] and hostfile is None else "fix"
            advice = "with several hosts give addresses (--master_addr) and set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface"
            found.append(Finding(verdict, f"host {name}", f"resolves to {addresses[0]}, which no other host reaches; {advice}"))
        else:
            found.append(Finding("ok", f"host {name}", ", ".join(addresses)))
    port = int(os.environ.get("MASTER_PORT", "29500"))
    try:
        with socket.create_server(("", port)):
            found.append(Finding("ok", f"port {port}", "free"))
    except OSError as error:
        found.append(Finding("fix", f"port {port}", f"{error.strerror}: choose another, --master_port or MASTER_PORT"))
    return found


def compilers() -> list[Finding]:
    """Burnish needs none; what they would be for."""
    found = []
    for tool, use in (("g++", "torch.compile on a CPU, DeepSpeed's own operators"), ("ninja", "DeepSpeed's own operators")):
        where = shutil.which(tool)
        found.append(Finding("ok" if where else "note", tool, where or f"not found; only needed for {use}"))
    return found


def folder(run: Path) -> list[Finding]:
    """Can it be written, flushed, locked and renamed in; how much room is there."""
    from training.run_lock import RunLock

    place = run if run.exists() else run.parent
    probe = place / f".doctor-{uuid.uuid4().hex}"
    try:
        probe.mkdir()
        (probe / "file").write_text("x")
        with open(probe / "file", "rb") as file:
            os.fsync(file.fileno())
        os.rename(probe / "file", probe / "renamed")
        began = time.perf_counter()
        RunLock(probe).release()
        seconds = time.perf_counter() - began
    except Exception as error:  # whatever a file system can say
        return [Finding("fix", f"folder {place}", f"{type(error).__name__}: {error}; set run.folder to one that can be written")]
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    room = shutil.disk_usage(place)
    text = f"{room.free / 2**30:.1f} GiB free: checkpoints of about {room.free / 16 / 1e9:.1f} billion parameters, one at a time"
    verdict = "note" if room.free < 0.05 * room.total or room.free < 2**30 else "ok"
    return [Finding("ok", f"folder {place}", f"can be written and locked ({seconds:.1f} s)"), Finding(verdict, "disk", text)]


def shared(run: Path, hosts: int, seconds: float = 60.0) -> list[Finding]:
    """Every host leaves a note with its clock in the folder, and reads those of the others."""
    meeting, me = run / ".doctor", f"{socket.gethostname()}-{os.getpid()}"
    meeting.mkdir(parents=True, exist_ok=True)
    own = meeting / f"{me}.json"
    notes: list[Path] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until and len(notes) < hosts:
        own.write_text(json.dumps({"clock": time.time()}))  # its time of change is the file server's, the same clock for all
        time.sleep(0.2)
        notes = [path for path in meeting.glob("*.json") if path.stat().st_mtime > own.stat().st_mtime - 30]
    if len(notes) < hosts:
        return [
            Finding(
                "fix", f"folder {run}", f"{len(notes)} of {hosts} hosts were seen in it after {seconds:.0f} s: it is not one shared folder"
            )
        ]
    time.sleep(1.0)  # those that came first still wait for the last
    skews = {}
    for path in notes:
        skews[path.stem] = json.loads(path.read_text())["clock"] - path.stat().st_mtime
    skew = max(skews.values()) - min(skews.values())
    time.sleep(1.0)
    own.unlink(missing_ok=True)
    advice = "" if skew < CLOCK_SECONDS else ": set them with NTP or chrony"
    return [
        Finding("ok", f"folder {run}", f"shared by {len(notes)} hosts"),
        Finding("fix" if advice else "ok", "clocks", f"within {skew:.1f} s of one another{advice}"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs"), help="where runs are to be kept")
    parser.add_argument("--hostfile", type=Path, help="of the deepspeed launcher")
    parser.add_argument("--hosts", type=int, default=1, help="how many hosts run this now, with the same --run")
    arguments = parser.parse_args()
    if arguments.hostfile is not None and not arguments.hostfile.is_file():
        print(f"error: {arguments.hostfile}: no such hostfile", file=sys.stderr)
        return 2
    findings = [*python_and_packages(), *accelerators(), *network(arguments.hostfile), *compilers(), *folder(arguments.run)]
    if arguments.hosts > 1:
        findings += shared(arguments.run, arguments.hosts)
    width = max(len(finding.subject) for finding in findings)
    for verdict, subject, text in findings:
        print(f"{verdict:4}  {subject:{width}}  {text}")
    return 1 if any(finding.verdict == "fix" for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
