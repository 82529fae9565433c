"""From a model to a pruned one: what `strop prune` does."""
