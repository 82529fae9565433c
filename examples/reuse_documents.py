"""Documents read once and used in any order, and a conversation that lost pages, on the bundled `rag` model.

python examples/reuse_documents.py
"""

import strop
from strop.kv import DocumentStore, SegmentCache

lm = strop.load("zoo:rag", dtype="fp32")
store = DocumentStore(lm, pages=64)
prices, names, places = store.add(["[tea=112;bun=207;]\n", "[ann=355;bob=641;]\n", "[pub=908;]\n"])

for query, documents in {
    "?bun=": [prices, names, places],
    "?bob=": [places, names, prices],
    "?pub=": [names, places],
    "?ann=": [names, prices, "[zoo=117;]\n"],
}.items():
    found = store.generate(query, documents, max_new_tokens=4)
    print(
        f"{query} {found.text}   computed {found.computed_tokens} tokens, "
        f"{found.computed_document_tokens} of documents; reused {found.reused_tokens}"
    )

cache = SegmentCache(lm, pages=9, page=8, evictor="asymcache")  # too few for both sessions
shop, town = "[tea=112;bun=207;cup=333;]\n[ann=355;bob=641;]\n", "[pub=908;inn=119;]\n[zoo=117;]\n"
for session, query in [(shop, "?bun="), (town, "?inn="), (shop, "?ann="), (town, "?zoo=")]:
    found = cache.generate(session + query, max_new_tokens=4)
    print(
        f"{query} {found.text}   computed {found.computed_tokens} tokens, "
        f"{found.recomputed_tokens} of them again; reused {found.reused_tokens}"
    )
