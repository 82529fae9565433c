"""What a number was measured on: hardware, versions, and the code itself."""

import datetime
import os
import platform
from functools import cache
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from strop.core.errors import StropError

UNMEASURED = (
    "audit/audit_report.py",
    "cli.py",
    "cli_audit.py",
    "cli_fleet.py",
    "cli_plan.py",
    "cli_prune.py",
    "cli_serve.py",
    "cli_train.py",
    "cli_zoo.py",
    "console.py",
    "core/executor.py",
    "core/page/__init__.py",
    "core/parquet.py",
    "core/processes.py",
    "core/words.py",
    "decode/fit.py",
    "doctor.py",
    "harness.py",
    "options.py",
    "profiling.py",
    "prune/prune_report.py",
    "tables.py",
    "tune/chosen.py",
    "tune/frontier.py",
    "tune/report.py",
    "tune/report_measures.py",
)
"""Code that no measurement runs through."""
HARDWARE = ("cpu", "gpu", "threads")
"""What an environment has besides versions."""


def version(package: str) -> str | None:
    """Installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu_name() -> str | None:
    """The first CUDA device, or None."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def environment() -> dict[str, Any]:
    """What a measurement depends on besides model, recipe, data and code: hardware, threads, versions."""
    import torch

    packages = ("torch", "transformers", "hqq", "optimum-quanto", "compressed-tensors")
    return {
        "cpu": cpu_name(),
        "gpu": gpu_name(),
        "threads": torch.get_num_threads(),
        **{package: version(package) for package in packages},
    }


def require_alike(driver: dict[str, Any], code: str) -> None:
    """Take over the threads of the process that shares out the work, on which sums depend.

    Raises StropError unless versions here are those of its `environment()` and `code_version()`.
    """
    import torch

    torch.set_num_threads(driver["threads"])
    here = environment()
    unlike = [name for name, said in driver.items() if name not in HARDWARE and here[name] != said]
    if code_version() != code:
        unlike.append("strop")
    if unlike:
        raise StropError(f"{', '.join(unlike)} of another version than the driver's: install the same")


def host(*packages: str) -> dict[str, Any]:
    """Hardware and versions, some packages' among them, without a tensor library."""
    from strop import __version__

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "os": platform.platform(terse=True),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "strop": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def machine() -> dict[str, Any]:
    """Hardware and versions, for reports."""
    import torch

    return host("torch", "transformers") | {"threads": torch.get_num_threads(), "gpu": gpu_name()}


@cache
def code_version() -> str:
    """16 hex digits that name the code that measures, so that a change of it makes old rows stale."""
    root = Path(__file__).parent.parent
    hasher = blake2b(digest_size=8)
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if name not in UNMEASURED and not name.startswith(("claims/", "serve/", "server/")):
            hasher.update(name.encode() + file.read_bytes())
    return hasher.hexdigest()
