"""What this machine has for strop to work with, and the command that brings what is missing.

Looks and never fails. Only torch is imported, since nothing else can say which GPUs it sees; a torch that
cannot be imported counts as missing.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from strop import __version__
from strop.core.errors import StropError
from strop.models.zoo import zoo_names, zoo_root

GIB = 1 << 30


@dataclass(frozen=True)
class Part:
    """One thing looked for: `found` says what is there, None that it is missing."""

    group: str
    name: str
    found: str | None
    required: bool
    purpose: str
    install: str
    """The command that brings it."""


PIP = "python -m pip install"
PACKAGES: dict[str, tuple[bool, str, str]] = {
    "torch": (True, "everything that runs a model", f"{PIP} torch"),
    "transformers": (True, "loading and running models", f"{PIP} 'transformers>=5.17,<5.24'"),
    "tokenizers": (True, "turning text into tokens", f"{PIP} tokenizers"),
    "safetensors": (True, "reading and writing weights", f"{PIP} safetensors"),
    "compressed-tensors": (True, "exporting weights that vLLM loads", f"{PIP} compressed-tensors"),
    "numpy": (True, "intervals and sampling", f"{PIP} numpy"),
    "numba": (True, "kernels on a CPU", f"{PIP} numba"),
    "psutil": (True, "checking that a model fits into memory", f"{PIP} psutil"),
    "pyyaml": (True, "reading recipes", f"{PIP} pyyaml"),
    "jinja2": (True, "writing reports", f"{PIP} jinja2"),
    "plotly": (True, "charts in reports", f"{PIP} plotly"),
    "triton": (False, "GPU kernels", f"{PIP} triton"),
    "hqq": (False, "transformers' HQQ cache, a baseline", f"{PIP} hqq"),
    "optimum-quanto": (False, "transformers' quanto cache, a baseline", f"{PIP} optimum-quanto"),
    "vllm": (False, "serving what strop exports", f"{PIP} vllm"),
    "starlette": (False, "strop serve", f"{PIP} 'strop[serve]'"),
    "uvicorn": (False, "strop serve", f"{PIP} 'strop[serve]'"),
    "prometheus-client": (False, "metrics of strop serve", f"{PIP} 'strop[serve]'"),
    "lm-eval": (False, "tasks of lm-evaluation-harness", f"{PIP} 'strop[lm-eval]'"),
    "ray": (False, "sweeps over several machines", f"{PIP} ray"),
}


def examine() -> list[Part]:
    """Everything that `strop doctor` looks at."""
    return [*_packages(), *_devices(), *_tools(), *_places()]


def healthy(parts: list[Part]) -> bool:
    """Whether everything required is there."""
    return all(part.found is not None for part in parts if part.required)


def to_dict(parts: list[Part]) -> dict[str, Any]:
    """The findings as plain data, in the order looked at."""
    return {"healthy": healthy(parts), "parts": [asdict(part) for part in parts]}


def _packages() -> list[Part]:
    python = platform.python_version() if sys.version_info >= (3, 11) else None
    fixed = [
        Part("version", "strop", __version__, True, "", ""),
        Part("version", "python", python, True, "running strop, from 3.11 on", "apt-get install python3.11"),
    ]
    return fixed + [
        Part("version", name, _version(name), required, purpose, install)
        for name, (required, purpose, install) in PACKAGES.items()
    ]


def _version(package: str) -> str | None:
    try:
        if package == "torch":
            return str(import_module("torch").__version__)
        return metadata.version(package)
    except (metadata.PackageNotFoundError, ImportError, OSError):
        return None


def _devices() -> list[Part]:
    cuda = f"{PIP} --force-reinstall torch"
    return [
        Part("device", "cpu", f"{_cpu_name()}, {os.cpu_count()} cores", True, "", ""),
        Part("device", "memory", _free_memory(), True, "holding models", f"{PIP} psutil"),
        Part("device", "gpu", _gpus(), False, "--device cuda, with an NVIDIA GPU", cuda),
    ]


def _cpu_name() -> str:
    try:
        return str(import_module("strop.core.machine").cpu_name())
    except ImportError:
        return platform.processor() or platform.machine()


def _free_memory() -> str | None:
    try:
        memory = import_module("psutil").virtual_memory()
    except ImportError:
        return None
    return f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"


def _gpus() -> str | None:
    try:
        cuda = import_module("torch").cuda
        if not cuda.is_available():
            return None
        names = [cuda.get_device_properties(index) for index in range(cuda.device_count())]
        return ", ".join(f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in names)
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None


def _tools() -> list[Part]:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    found = browser if shutil.which("chromedriver") else None
    install = "apt-get install chromium chromium-driver"
    return [Part("tool", "chromium", found, False, "the test that opens a report", install)]


def _places() -> list[Part]:
    here = "cd to a folder of yours"
    return [
        Part(
            "place",
            "zoo",
            _zoo(),
            False,
            "the bundled models",
            "export STROP_ZOO=FOLDER, or strop zoo train NAME",
        ),
        Part("place", "here", _writable(), True, "writing studies to runs/", here),
        Part("place", "disk", _free_disk(), True, "writing studies: 0.1 GiB or more", "rm -r runs/OLD"),
    ]


def _zoo() -> str | None:
    try:
        names = zoo_names()
        return f"{', '.join(names)} in {zoo_root()}" if names else None
    except (StropError, OSError):
        return None


def _writable() -> str | None:
    try:
        with tempfile.TemporaryDirectory(dir=".", prefix=".strop."):
            return f"{Path.cwd()} is writable"
    except OSError:
        return None


def _free_disk() -> str | None:
    try:
        free = shutil.disk_usage(".").free
    except OSError:
        return None
    return f"{free / GIB:.1f} GiB free" if free > GIB / 10 else None
