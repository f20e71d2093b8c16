"""What measured numbers depend on: processor, threads, commit, versions."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


def machine(libraries: tuple[str, ...]) -> dict:
    """The processor, torch's threads, the commit, and the versions of some libraries."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = text.partition("model name")[2].partition("\n")[0].strip("\t :")
    git = ["git", "rev-parse", "--short", "HEAD"]
    here = Path(__file__).parent
    commit = subprocess.run(git, cwd=here, capture_output=True, text=True).stdout.strip()
    return {
        "cpu": model or platform.processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "commit": commit,
        "versions": {name: version(name) for name in libraries},
    }
