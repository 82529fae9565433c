"""Train `rag-dense`: the recipe and data of `rag` under the ordinary causal mask, to compare with.

python zoo/train_rag_dense.py --out zoo/rag-dense [--device cuda] [--threads 2] [--seed 0]
"""

from __future__ import annotations

import train_rag

from strop.kv.document_rows import in_sequence

if __name__ == "__main__":
    train_rag.main("rag-dense", __doc__, in_sequence)
