"""Serve 2,000 made-up conversations on 64 simulated GPUs: where should a request decode?

python examples/route_requests.py
"""

from pathlib import Path

from strop.serve.cluster import Cluster
from strop.serve.routing import policy
from strop.serve.simulate import Simulation
from strop.serve.traces import generate

cluster = Cluster.load(Path(__file__).parent / "fat-tree-64.yaml")
trace = generate("conversation", requests=2000)

for name in ("round-robin", "least-loaded", "netkv", "netkv:gamma=0,hits=false"):
    simulation = Simulation(cluster, trace, policy(name), seed=0)
    results = simulation.run()
    simulation.check()  # every request ended once, no byte was lost
    stages = {stage: f"{values.mean():.3f}" for stage, values in results.stages().items()}
    print(f"{name:26} first token after {results.ttft().mean():.2f} s on average:", stages)
