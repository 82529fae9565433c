"""The commands that write folders, and what a folder must look like whatever was done to its writer."""

import csv
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from safetensors import safe_open

from robustness.warm import Warm


@dataclass(frozen=True)
class Job:
    """A command line without the place of its results."""

    words: tuple[object, ...]
    out: str
    resume: bool = True
    """Whether it goes on with --resume; else by the same command again."""
    same: tuple[str, ...] = ("**/*",)
    """Files that are promised to be the same bytes, however often the run was interrupted."""

    def line(self, out: Path, again: bool = False) -> list[object]:
        """The command line, or the one to go on with."""
        return [*self.words, self.out, out, *(["--resume"] if again and self.resume else [])]

    def is_done(self, out: Path) -> bool:
        """Whether there is nothing to go on with: a quantized folder appears when it is complete."""
        return "quantize" in self.words and out.exists()


@dataclass(frozen=True)
class Known:
    """A job that ran undisturbed."""

    job: Job
    whole: Path
    """What it wrote."""
    seconds: float
    steps: list[str]
    """What it did to files."""


def jobs(model: Path, experts: Path, text: Path) -> dict[str, Job]:
    """Runs of a second or a few."""
    tune = (
        "tune",
        model,
        "--data",
        text,
        "--context",
        48,
        "--methods",
        "rtn,prompt_lookup",
        "--objective",
        "memory",
    )
    train = ("train", "drafter", "--target", model, "--data", text, "--tokens", 300, "--steps", 6)
    gptq = text.with_name("gptq.yaml")
    told = {"bits": 4, "group": 32, "samples": 4, "length": 64, "calibration": str(text)}
    gptq.write_text(yaml.safe_dump({"strop": 1, "model": str(model), "weights": {"gptq": told}}))
    return {
        "rtn": Job(("quantize", model, "--method", "rtn", "--group", 32), "--out"),
        "gptq": Job(("quantize", gptq), "--out"),
        "alphaq": Job(("quantize", experts, "--method", "alphaq", "--group", 32, "--bits", 2.5), "--out"),
        "tune": Job(tune, "--out", same=()),
        "train": Job(
            (*train, "--layers", 1, "--block", 4, "--treeflash"),
            "--out",
            resume=False,
            same=("model.safetensors", "config.json", "run.json"),
        ),
    }


def listed(folder: Path) -> set[str]:
    """Everything below a folder, hidden things too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def shown(folder: Path) -> Iterator[Path]:
    """Files under their final names: neither they nor their folders are hidden."""
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def require_whole(folder: Path) -> None:
    """Every file under its final name can be read to its end."""
    for path in shown(folder):
        assert path.stat().st_size or ".sqlite" in path.suffix, f"{path} is empty"  # SQLite takes it for none
        match path.suffix:
            case ".json":
                json.loads(path.read_text())
            case ".yaml":
                assert yaml.safe_load(path.read_text())
            case ".html":
                assert path.read_text().rstrip().endswith("</html>")
            case ".csv":
                assert path.read_text().endswith("\n") and list(csv.DictReader(path.open()))
            case ".safetensors":
                with safe_open(path, "pt") as file:
                    assert [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
            case ".sqlite":
                with sqlite3.connect(path) as connection:
                    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                connection.close()


def goes_on(warm: Warm, known: Known, out: Path) -> None:
    """The same run finishes, and leaves what an undisturbed one leaves and nothing else."""
    again = warm.run(*known.job.line(out, again=True))
    assert again.code == 0, again.stderr
    require_done(known, out)


def require_done(known: Known, out: Path) -> None:
    """A folder is as an undisturbed run leaves it, and nothing lies beside it."""
    require_whole(out)
    for pattern in known.job.same:
        for path in filter(Path.is_file, known.whole.glob(pattern)):
            other = out / path.relative_to(known.whole)
            assert other.read_bytes() == path.read_bytes(), f"{other} differs from an undisturbed run's"
    left = listed(out.parent) ^ listed(known.whole.parent)
    assert not left, f"{sorted(left)} are left, or missing"
