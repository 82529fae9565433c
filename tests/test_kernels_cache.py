"""Kernels give the same bits whether they were compiled in this process or loaded from numba's cache.

Whole kernels take long to compile, so what they call is put into a small one, in a file that can be cached.
"""

import os
import subprocess
import sys

KERNEL = """
import hashlib, re, warnings
import numpy as np
from strop.kernels.linear_numba import _add_middles
from strop.kernels.record_numba import kernel
from strop.kernels.tiles_numba import _rotate, _soften

@kernel
def part(x, y, sums, logs):
    _rotate(x)
    for n in range(len(x)):
        logs[n] = _soften(x[n])[1]
    _add_middles(x, y, y, np.float32(1), sums)

if __name__ == "__main__":
    x, y = np.random.default_rng(0).standard_normal((2, 100, 64), np.float32)
    sums, logs = np.zeros((100, 100), np.float32), np.empty(100, np.float32)
    part(x, y, sums, logs)
    warnings.simplefilter("ignore")
    weak = re.findall(r"\\.weak\\s+(\\S*strop\\S*)", *part.inspect_asm().values())
    digest = hashlib.sha256(x.tobytes() + sums.tobytes() + logs.tobytes()).hexdigest()
    print(sum(part.stats.cache_hits.values()), digest, *weak)
"""
"""Prints how many kernels came from the cache, a digest of their results, and what is not inlined."""


def test_a_loaded_kernel_gives_the_bits_of_a_compiled_one(tmp_path):
    file = tmp_path / "part.py"
    file.write_text(KERNEL)
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(file)]
    lines = [
        subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        for _ in range(2)
    ]
    (compiled, one, *weak), (loaded, other) = lines
    assert (compiled, loaded) == ("0", "1")
    assert one == other
    assert not weak
