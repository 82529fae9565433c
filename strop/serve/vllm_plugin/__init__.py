"""Eviction order and hole skipping for vLLM, without a fork; vLLM itself imports `scheduler`.

`vllm serve MODEL --scheduler-cls strop.serve.vllm_plugin.scheduler.StropScheduler`; see docs/vllm.md.
"""
