"""The main job from Python: measure a few methods on your own text and run the recipe that comes back.

python examples/tune_from_python.py
"""

from pathlib import Path

import strop
from strop.kv import KVarN
from strop.tasks.python_source import held_out_text
from strop.tune.engine import tune
from strop.tune.settings import Settings

out = Path("runs/example")
out.mkdir(parents=True, exist_ok=True)
text = out / "mine.txt"
text.write_text("\n".join(held_out_text()[:2])[:8_000])

settings = Settings(methods=("kvarn",), context=640, objective="memory", max_drop=0.02)
study = tune("zoo:coder", text, out, settings, report=lambda what, share: print(f"{share:4.0%} {what}"))

for row in study["rows"]:
    if row["status"] == "measured":
        drop, memory = row["quality"]["drop_hi"], row["memory"]["ratio"]
        mark = " <- chosen" if row["chosen"] else ""
        print(f"{row['label']:>20}: memory {memory:.2f}, drop at most {drop:.2%}{mark}")

lm = strop.load(out / "recipe.yaml")
print(lm.generate(["def main():"], max_new_tokens=24))

# The same methods without a study:
thin = strop.load("zoo:coder").with_(kv=KVarN(bits=2))
print(thin.generate(["def main():"], max_new_tokens=24, seed=0))
