"""A plan as a few lines of text: a bar a replica, as wide as its blocks are many."""

from strop.serve.plan.plan import PREFILL, DeploymentPlan, Replica

LABEL = 11


def picture(plan: DeploymentPlan, width: int = 80) -> list[str]:
    """A line a replica, with the devices along its blocks (* has the head), and what stays idle."""
    lines = [
        f"{_label(replica):<{LABEL}}|{_bar(replica, plan.blocks, width - LABEL - 2)}|"
        for replica in plan.replicas
    ]
    if plan.idle:
        lines.append(f"{'idle':<{LABEL}} {', '.join(plan.idle)}: a defect, they serve nothing")
    return lines


def _label(replica: Replica) -> str:
    return replica.role if replica.role == PREFILL else f"{replica.role} x{replica.concurrency}"


def _bar(replica: Replica, blocks: int, width: int) -> str:
    ends = [round(width * (stage.last + 1) / blocks) for stage in replica.stages]
    parts = []
    for stage, start, end in zip(replica.stages, [0, *ends], ends, strict=False):
        room = max(end - start - bool(start), 0)
        name = f"{'*' * stage.master}{stage.device} {stage.blocks} "
        parts.append(name[:room].ljust(room, "."))
    return "|".join(parts)
