"""Draft trees on a bare transformers model: the same text from fewer passes, and what each part took.

In float32, since bfloat16 may turn near-ties.

python examples/draft_on_transformers.py [CHECKPOINT_FOLDER DRAFTER]
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from strop.decode import FixedBudget, load_drafter, speculative
from strop.models.zoo import zoo_path
from strop.tasks.python_source import held_out_text

folder, drafter = sys.argv[1:] if len(sys.argv) > 2 else (zoo_path("coder"), "zoo:coder-treeflash")
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(held_out_text()[0], return_tensors="pt")
inputs = {name: inputs[name][:, :400] for name in ("input_ids", "attention_mask")}


def write(custom=None):
    """Continue the prompt; the text, and seconds."""
    started = time.perf_counter()
    out = model.generate(**inputs, max_new_tokens=120, do_sample=False, custom_generate=custom)
    return tokenizer.decode(out[0, 400:]), time.perf_counter() - started


plain, seconds = write()
print(f"{'without drafts':>16}: {seconds:.2f} s")

# A size for all trees; without one, sizes follow from what rounds cost here, which is measured once.
for name, draft in {"ngram": "ngram", "drafter": drafter}.items():
    method = speculative(load_drafter(draft, model), FixedBudget(12))
    text, seconds = write(method)
    told = method.stats.to_dict()
    print(
        f"{name:>16}: {seconds:.2f} s, {told['spec_accept_length']:.2f} tokens from each of "
        f"{told['spec_verify_ct']} passes, {'the same text' if text == plain else 'another text'}"
    )
    print(f"{'':>18}rounds by accepted tokens: {told['accepted_by_depth']}")
