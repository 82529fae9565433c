"""A model under a recipe as one of lm-evaluation-harness's, and the harness's tasks as measures of a recipe.

The harness finds no models outside itself, so this is its own command line with `strop` among its models:

    python -m strop.harness --model strop --model_args recipe=RECIPE.yaml --tasks TASK --batch_size 8

In Python `import strop.harness` makes the name known. Model args are recipe (a file, `zoo:NAME` or a folder),
dtype and device. Generation runs over the recipe's cache, with its drafter. A pass over the whole text would
not feel a kv method, so under one log-likelihoods are read in blocks, as in `strop measure`; without one all
numbers are those of the harness's `hf`.
"""

import copy
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from strop.audit.quality import pseudo_decode
from strop.core.errors import StropError
from strop.core.files import did_you_mean
from strop.decode.calibrate import Report
from strop.model import DTYPES, Model, load

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.api.task import Task
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import simple_parse_args_string
except ModuleNotFoundError as error:
    MISSING = f"the harness's package {error.name} is not installed: python -m pip install 'strop[lm-eval]'"
    if __name__ != "__main__":
        raise StropError(MISSING) from error
    print(f"strop: {MISSING}", file=sys.stderr)
    sys.exit(2)

ARGS = ["recipe", "dtype", "device"]
DEVICES = ("cpu", "cuda")
UNSAID = "cuda:0"
"""The device that the harness's command line hands on where nobody named one."""
YAML = (".yaml", ".yml")
SEED = 1234
"""Where the harness's own draws of examples and of text begin."""


@register_model("strop")
class StropLM(HFLM):
    """The harness's model of transformers, with a recipe's cache and drafter in force."""

    def __init__(
        self,
        recipe: str | Model | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        batch_size: int | str = 1,
        max_batch_size: int | None = 64,
        **unknown: Any,
    ) -> None:
        """Take a model, or load what `recipe` names. Raises StropError for what is unknown or not loaded."""
        if device == UNSAID:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        for name in unknown:
            raise StropError(f"the model argument {name!r} is unknown; {did_you_mean(name, ARGS)}")
        for name, value, known in (("dtype", dtype, DTYPES), ("device", device, DEVICES)):
            if value not in known:
                raise StropError(f"{name}={value} is unknown; {did_you_mean(str(value), list(known))}")
        if recipe is None:
            raise StropError("no model is named: add --model_args recipe=RECIPE.yaml, zoo:NAME or a folder")
        self.lm = recipe if isinstance(recipe, Model) else load(str(recipe), dtype, device)
        if self.lm.recipe.reuse is not None:
            raise self.lm.recipe.reuse.needs_pages()
        super().__init__(
            pretrained=self.lm.model,
            tokenizer=copy.deepcopy(self.lm.tokenizer),  # the harness gives its own a padding token
            batch_size=batch_size,
            max_batch_size=max_batch_size,
        )

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "StropLM":
        """A model by model args, which come before what the command line says for all models."""
        told = (additional_config or {}) | arg_dict
        return cls(**{name: value for name, value in told.items() if value is not None})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "StropLM":
        """The same for model args as one string."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Logits `[B, T, V]` in the model's dtype of texts `[B, T]`, padded on the right."""
        if self.lm.recipe.kv is None:
            return super()._model_call(inps, attn_mask, labels)
        blocks = pseudo_decode(self.lm.model, inps, self.lm.new_cache())
        return torch.cat([block.to(self.lm.dtype) for block in blocks], dim=1)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Prompts `[B, T]`, padded on the left, with what follows; one at a time where tokens are drafted."""
        if self.lm.recipe.decode is None:
            return self._continue(context, max_length, stop, **options)
        mask, new = options.pop("attention_mask").bool(), max_length - context.shape[1]
        rows = []
        for ids, real in zip(context, mask, strict=True):
            prompt = ids[real][None]
            whole = self._continue(prompt, prompt.shape[1] + new, stop, **options)
            rows.append(torch.cat([ids[~real], whole[0]]))
        return torch.nn.utils.rnn.pad_sequence(rows, True, self.tokenizer.pad_token_id)

    def _continue(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        cache = self.lm.new_cache()
        options |= {"past_key_values": cache, **self.lm.decoding}
        return super()._model_generate(context=context, max_length=max_length, stop=stop, **options)


class Suite:
    """Tasks of the harness, or of the user's own files, found and loaded before anything is measured."""

    def __init__(self, asked: Sequence[str]) -> None:
        """Raises StropError for a task that is unknown, whose data is out of reach, or that runs code."""
        folders = {name: _folder(name) for name in asked}
        own = sorted({str(folder) for folder in folders.values() if folder})
        with _silent():
            self.manager = TaskManager(include_path=own or None, include_defaults=None in folders.values())
        named = (name for entry, folder in folders.items() for name in self._named(entry, folder))
        self.tasks = {name: self._read(name) for name in dict.fromkeys(named)}

    def _named(self, entry: str, folder: Path | None) -> list[str]:
        """The harness's names of what a user asked for by name, pattern, file or folder."""
        if folder is None:
            found = self.manager.match_tasks([entry])
        else:
            files = sorted(folder.iterdir()) if Path(entry).is_dir() else [Path(entry)]
            found = [name for file in files if file.suffix in YAML and (name := _task_name(file))]
        if not found and folder is None:
            hint = did_you_mean(entry, self.manager.all_tasks).partition("known: ")[0]
            ways = "`python -m strop.harness ls tasks` lists all, and a file's path is one of yours"
            raise StropError(f"the harness knows no task {entry!r}; {hint}{ways}")
        if not found:
            raise StropError(f"{entry} defines no task: give a YAML file with a line `task: NAME`")
        return found

    def _read(self, name: str) -> Mapping[str, Any]:
        """A task or a group of tasks as `evaluate` takes it, with data."""
        read = getattr(self.manager, "load", None) or self.manager.load_task_or_group  # the older name
        try:
            with _silent():
                found = read([name])
        except Exception as error:  # a task's data comes by any of several libraries
            raise StropError(_unread(name, error)) from error
        if any(getattr(task, "UNSAFE_CODE", False) for task in _leaves(found)):
            raise StropError(
                f"the task {name} runs code that the model writes: where that is safe, use "
                "`python -m strop.harness` with --confirm_run_unsafe_code"
            )
        return found

    def compare(
        self, base: Model, other: Model, batch: int, report: Report = lambda what, share: None
    ) -> list[dict[str, Any]]:
        """A row for each score of each task: under the recipe and as is, with the harness's own errors."""
        rows = []
        for done, name in enumerate(self.tasks):
            found = []
            for place, model in enumerate((base, other)):
                report(f"task {name}", (2 * done + place) / (2 * len(self.tasks)))
                found.append(self._evaluate(name, model, batch))
            as_is, under = found
            for (task, metric, kind), (samples, score, error) in under.items():
                _, plain, plain_error = as_is[task, metric, kind]
                rows.append(
                    {"task": task, "metric": metric, "filter": kind, "samples": samples}
                    | {"score": score, "stderr": error, "as_is": plain, "as_is_stderr": plain_error}
                )
        return rows

    def _evaluate(self, name: str, model: Model, batch: int) -> dict[tuple[str, ...], tuple[Any, ...]]:
        """What a model scores: samples, score and standard error by task, metric and filter."""
        for task in _leaves(self.tasks[name]):
            task.set_fewshot_seed(SEED)
        torch.manual_seed(SEED)
        try:
            with _silent():
                lm = StropLM(model, batch_size=batch)
                told = evaluate(lm=lm, task_dict=self.tasks[name], log_samples=False)
        except (StropError, MemoryError):
            raise
        except Exception as error:  # a task's YAML has many ways to be wrong, and its own code may run
            if _raised_in(error).startswith("strop."):
                raise
            said = f"{type(error).__name__}: {_said(error)}"
            raise StropError(f"the harness cannot run the task {name} ({said}): mend its YAML") from error
        found = {}
        for task, scores in told["results"].items():
            samples = told["n-samples"].get(task, {}).get("effective")
            for key, score in scores.items():
                metric, comma, kind = key.partition(",")
                if comma and not metric.endswith("_stderr"):
                    errors = _number(scores.get(f"{metric}_stderr,{kind}"))
                    found[task, metric, kind] = (samples, _number(score), errors)
        return found


def _folder(name: str) -> Path | None:
    """Where a task of the user's own is; None for one that the harness knows by name."""
    path = Path(name)
    if path.suffix in YAML:
        if not path.is_file():
            raise StropError(f"{name} is no file: give the path of a task's YAML, or the name of a task")
        return path.parent
    return path if path.is_dir() else None


class _Untagged(yaml.SafeLoader):
    """Reads a task's YAML without running the functions that it names."""


_Untagged.add_multi_constructor("!", lambda loader, suffix, node: None)


def _task_name(file: Path) -> str | None:
    """The group or task that a YAML file defines."""
    try:
        config = yaml.load(file.read_text(), _Untagged)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StropError(f"{file} is not YAML: {_said(error)}") from error
    name = (config.get("group") or config.get("task")) if isinstance(config, Mapping) else None
    return name if isinstance(name, str) else None


def _unread(name: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"the task {name} needs the package {error.name}: install it with pip"
    return (
        f"the task {name} cannot be loaded ({type(error).__name__}: {_said(error)}): bring its data set onto "
        "this machine, or mend its YAML"
    )


def _raised_in(error: Exception) -> str:
    """The module that raised it."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"])


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")


def _leaves(tree: Mapping[Any, Any]) -> Iterator[Task]:
    """The tasks in what the harness read, flat or by group."""
    for part in tree.values():
        if isinstance(part, Mapping):
            yield from _leaves(part)
        elif isinstance(part, Task):
            yield part


def _number(told: Any) -> float | None:
    """A score or its error; the harness writes text where there is none."""
    return float(told) if isinstance(told, (int, float)) else None


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing of what the harness prints, its bars included."""
    with open(os.devnull, "w") as sink, redirect_stdout(sink), redirect_stderr(sink):
        yield


def main() -> None:
    """The harness's command line; what a user can mend ends in one sentence and exit code 2."""
    try:
        cli_evaluate()
    except (StropError, AssertionError, ValueError, OSError) as error:
        by_harness = _raised_in(error).startswith("lm_eval")
        if isinstance(error, (AssertionError, ValueError)) and not by_harness:
            raise
        print(f"strop: {_said(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
