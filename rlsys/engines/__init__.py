"""Inference engines. The only room that imports vllm, and only `vllm_engine` and `receiver` do.

`protocol` says what an engine is; `driver` runs one in a thread beside an asyncio loop and swaps weight
versions between two decode steps; `vllm_engine` is vLLM; `receiver` maps a flat weight buffer onto its model.
"""

import logging
import os
import warnings

# What vLLM says while it is imported, before it reads its settings, and PyTorch's remark on where memory is taken.
logging.getLogger("vllm").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
