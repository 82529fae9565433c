"""Tasks of lm-evaluation-harness over a few documents of real text, as files."""

import json
from pathlib import Path

from strop.tasks.python_source import held_out_text

PAGES = [text[:length] for text, length in zip(held_out_text(), (420, 250, 330, 180, 380), strict=False)]
TASKS = {
    "choosing": (
        "output_type: multiple_choice, doc_to_text: '{{page}}', doc_to_choice: choices, "
        "doc_to_target: right, target_delimiter: '', metric_list: [{metric: acc}, {metric: acc_norm}]"
    ),
    "reading": (
        "output_type: loglikelihood_rolling, doc_to_text: '', doc_to_target: '{{page}}', "
        "metric_list: [{metric: bits_per_byte}]"
    ),
    "writing": (
        "output_type: generate_until, doc_to_text: '{{page}}', doc_to_target: next, "
        "generation_kwargs: {until: ['e'], max_gen_toks: 24}, metric_list: [{metric: exact_match}]"
    ),
}


def write_task(folder: Path, name: str, settings: str, data: Path) -> Path:
    """A task's YAML file over a file of documents."""
    file = folder / f"{name}.yaml"
    where = f"{{data_files: {{test: {data}}}, cache_dir: {folder / 'cache'}}}"
    file.write_text(
        f"{{task: {name}, dataset_path: json, test_split: test, dataset_kwargs: {where}, {settings}}}"
    )
    return file


def write_tasks(folder: Path) -> Path:
    """A folder of all tasks, with their documents."""
    documents = [
        {"page": page[:-20], "choices": [page[-20:], " x", " = y", ")"], "right": 0, "next": page[-20:]}
        for page in PAGES
    ]
    data = folder / "documents.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)))
    for name, settings in TASKS.items():
        write_task(folder, name, settings, data)
    return folder
