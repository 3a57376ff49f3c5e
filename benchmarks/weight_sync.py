"""What does it cost to serve a new version? Against copying its bytes once.

    python -m benchmarks.weight_sync [--rounds 7]

For a model of about 0.8M and one of about 50M parameters, on one node: the learner's parameters are packed and
put into Ray's object store, a vLLM engine in this process fetches, verifies and serves them, then the same
bytes are copied with memcpy. `apply` is what decoding waits for; `verify` runs beside decoding.
"""

import argparse
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import keep, ratios, say, summary
from rlsys.config.schema import ModelConfig, ResourcesConfig, RolloutConfig, RunConfig, TinyModelConfig
from rlsys.config.tasks import ArithmeticTask

SIZES = {
    "0.8M": TinyModelConfig(),
    "50M": TinyModelConfig(hidden_size=640, layers=8, heads=8, kv_heads=8, intermediate_size=2432),
}


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", choices=SIZES)
    arguments = parser.parse_args()
    if arguments.size is None:  # one process a size: an engine cannot be started twice in one
        import subprocess
        import sys

        for size in SIZES:
            subprocess.run(
                [sys.executable, "-m", "benchmarks.weight_sync", "--rounds", str(arguments.rounds), "--size", size],
                check=True,
            )
        return
    result = measure(SIZES[arguments.size], arguments.rounds)
    keep(f"weight_sync_{arguments.size}", f"python -m benchmarks.weight_sync --rounds {arguments.rounds}", result)


def measure(tiny: TinyModelConfig, rounds: int) -> dict[str, Any]:
    """Seconds of every part, by round, and the ratios to a memcpy of the bytes."""
    from rlsys.actors.process import settle

    settle("other", RunConfig(task=ArithmeticTask(name="arithmetic"), resources=ResourcesConfig(pin_cores=False)))
    import numpy as np
    import ray
    import torch

    from rlsys.engines.vllm_engine import VllmEngine
    from rlsys.learning.policy import load_policy
    from rlsys.learning.tiny import make_tiny
    from rlsys.weights.buffer import WeightPacker, verify
    from rlsys.weights.transport import ObjectStoreTransport

    torch.set_num_threads(1)
    scratch = Path(tempfile.mkdtemp())
    make_tiny(tiny, "0123456789+=", scratch / "model", seed=0)
    policy = load_policy(scratch / "model", "float32")
    packer = WeightPacker(policy.named_tensors(), dtype="float32", vocab_size=policy.vocab_size)
    engine = VllmEngine(str(scratch / "model"), ModelConfig(max_context=64), RolloutConfig(), seed=0)
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(address="local", num_cpus=1, object_store_memory=2 << 30, include_dashboard=False, log_to_driver=False)
    transport = ObjectStoreTransport()
    names = ("pack", "send", "receive", "verify", "apply", "memcpy")
    samples: dict[str, list[float]] = {name: [] for name in names}
    target = np.zeros(packer.nbytes, dtype=np.uint8)
    payloads: list[Any] = []
    for version in range(1, rounds + 3):
        marks = [time.perf_counter()]
        manifest, buffer = packer.pack(policy.named_tensors(), version)
        marks.append(time.perf_counter())
        payloads = [*payloads[-1:], transport.send(buffer)]
        marks.append(time.perf_counter())
        received = transport.receive(payloads[-1])
        marks.append(time.perf_counter())
        verify(manifest, received)
        marks.append(time.perf_counter())
        engine.apply(manifest, received)
        marks.append(time.perf_counter())
        np.copyto(target, received)
        marks.append(time.perf_counter())
        if version > 2:  # the first rounds touch memory for the first time
            for name, start, stop in zip(names, marks, marks[1:], strict=False):
                samples[name].append(stop - start)
    engine.shutdown()
    ray.shutdown()
    shutil.rmtree(scratch)
    found = {
        "apply_over_memcpy": ratios(samples["apply"], samples["memcpy"]),
        "verify_and_apply_over_memcpy": ratios(
            [v + a for v, a in zip(samples["verify"], samples["apply"], strict=True)], samples["memcpy"]
        ),
    }
    parameters = sum(tensor.numel() for _, tensor in policy.named_tensors())
    say(f"{parameters / 1e6:.2f}M parameters, {packer.nbytes / 1e6:.1f} MB")
    everything = {**samples, **found}
    for name, values in everything.items():
        say(f"{name:<30} {summary(values)}")
    return {
        "parameters": parameters,
        "nbytes": packer.nbytes,
        "samples": samples,
        "ratios": found,
        "summary": {name: summary(values) for name, values in everything.items()},
    }


if __name__ == "__main__":
    main()
