"""Inference engines. The only room that imports vllm, and only `vllm_engine` and `receiver` do.

`protocol` says what an engine is; `driver` runs one in a thread beside an asyncio loop and swaps weight
versions between two decode steps; `vllm_engine` is vLLM; `receiver` maps a flat weight buffer onto its model.
"""
