"""KVarN on a bare transformers model: no strop.Model around it, ordinary `generate`.

python examples/kvarn_on_transformers.py [CHECKPOINT_FOLDER]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import strop.kv
from strop.core.cache import tensor_bytes
from strop.models.zoo import zoo_path
from strop.tasks.python_source import held_out_text

folder = sys.argv[1] if len(sys.argv) > 1 else zoo_path("coder")
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
tokenizer = AutoTokenizer.from_pretrained(folder)

strop.kv.attach(model)  # attention now runs on packed tiles; without it: correct, but not fused

inputs = tokenizer(held_out_text()[0], return_tensors="pt")
inputs = {name: tensor[:, :1500] for name, tensor in inputs.items() if name != "token_type_ids"}

for name, cache in {
    "dense": DynamicCache(config=model.config),
    "kvarn k4v2": strop.kv.KVarN().new_cache(model.config),
    "kvarn k2v2": strop.kv.KVarN(bits=2).new_cache(model.config),
}.items():
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    print(f"{name:>10}: {tensor_bytes(cache.layers) / cache.get_seq_length():6.0f} bytes/token  {text!r}")
