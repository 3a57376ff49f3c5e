"""Inference engines. The only room that imports vllm, and only `vllm_engine`, `receiver` and `transfer` do.

`protocol` says what an engine is; `driver` runs one in a thread beside an asyncio loop and swaps weight
versions between two decode steps; `vllm_engine` is vLLM; `receiver` maps a flat weight buffer onto its model;
`transfer` brings that buffer from GPU to GPU, through vLLM's weight-transfer backends.
"""

import logging
import os
import warnings

# What vLLM says while it is imported, before it reads its settings, and PyTorch's remark on where memory is taken.
logging.getLogger("vllm").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# Read when vllm is imported. Its warnings are about compilation and preloaded libraries; standard output is for what
# the command line prints.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
