"""vLLM as an `Engine`: in this process, eager, one decode step at a time.

Running in-process lets a new version be swapped in exactly between two steps, so vLLM's own per-token
weight versions are exact. Every private vLLM name the project touches is in this file, `receiver` and
`transfer`, each with a test that fails when vLLM changes it.
"""

import os

# Read when vllm is imported. In-process engine; no compiled log-prob rank (20 s at the first request).
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import logging
import warnings

import numpy as np
import torch
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.exceptions import VLLMClientError
from vllm.model_executor.layers import utils as vllm_linear
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind

from rlsys.config.schema import ModelConfig, RolloutConfig
from rlsys.engines import receiver
from rlsys.engines.protocol import Buffer, Sampled, Sampling
from rlsys.engines.transfer import BackendReceiver
from rlsys.errors import ConfigError, EngineError, WeightSyncError
from rlsys.records import FinishReason
from rlsys.versions import PolicyVersion, VersionSpan, WeightManifest

log = logging.getLogger(__name__)

GIB = 1 << 30

# Ray's shared memory is read-only, and nothing here writes to it.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


class VllmEngine:
    """Continuous batching over one model directory, serving version `version` from the start."""

    def __init__(
        self, path: str, model: ModelConfig, rollout: RolloutConfig, *, seed: int, version: PolicyVersion = 0
    ) -> None:
        if rollout.engine_options.get("enable_prefix_caching") and not rollout.reset_kv_on_update:
            raise ConfigError(
                "rollout.engine_options.enable_prefix_caching=true: cached prefixes outlive a weight update; "
                "allowed only with rollout.reset_kv_on_update=true"
            )
        receiver.register()
        _keep_plain_linear_weights()
        on_gpu = torch.cuda.is_available()
        memory = {} if on_gpu else {"kv_cache_memory_bytes": int(rollout.kv_cache_gib * GIB)}
        arguments = {
            "model": path,
            "dtype": rollout.dtype,
            "max_model_len": model.max_context,
            "max_num_seqs": rollout.max_concurrent_sequences,
            "enforce_eager": not on_gpu,
            "enable_prefix_caching": False,
            "async_scheduling": False,  # a batch in flight over an update would be labelled with the wrong version
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "generation_config": "vllm",  # sampling defaults of the model directory must not leak in
            "weight_transfer_config": WeightTransferConfig(backend=receiver.BACKEND),
            "trust_remote_code": False,
            "seed": seed,
            **memory,
            **rollout.engine_options,
        }
        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._engine.collective_rpc("init_weight_transfer_engine", args=({},))
        self._engine.set_weight_version(str(version))
        self._reset_kv = rollout.reset_kv_on_update
        self._version = version

    @property
    def serving_version(self) -> PolicyVersion:
        """Version the next step samples from."""
        return self._version

    @property
    def busy(self) -> bool:
        """Whether requests are unfinished."""
        return self._engine.has_unfinished_requests()

    def add(self, key: str, prompt_ids: tuple[int, ...], samples: int, sampling: Sampling) -> None:
        """Queue `samples` responses to `prompt_ids`. Raises `EngineError` when they do not fit the context."""
        params = SamplingParams(
            n=samples,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            logprobs=0,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        torch.get_num_threads()  # torch settles a thread's OpenMP count at first use, and vLLM plans with that count
        try:
            self._engine.add_request(key, {"prompt_token_ids": list(prompt_ids)}, params)
        except (ValueError, VLLMClientError) as error:
            raise EngineError(f"prompt of {len(prompt_ids)} tokens refused: {error}") from error

    def step(self) -> list[tuple[str, list[Sampled]]]:
        """Decode one token of every running response; groups whose last response ended are returned."""
        outputs = self._engine.step()
        return [
            (output.request_id, [_sampled(completion) for completion in output.outputs])
            for output in outputs
            if isinstance(output, RequestOutput) and output.finished
        ]

    def apply(self, manifest: WeightManifest, buffer: Buffer) -> None:
        """Swap in a verified version between two steps.

        Raises `WeightSyncError` when it is refused before anything was changed; the old one keeps serving. Raises
        `EngineError` when it failed half-way: parameters of two versions, or a cache of the old one, serve nobody.
        """
        tensor = buffer if isinstance(buffer, torch.Tensor) else torch.frombuffer(buffer, dtype=torch.uint8)
        update = {"manifest": manifest, "buffer": tensor}
        self._engine.collective_rpc("start_weight_update")
        try:
            self._engine.collective_rpc("update_weights", args=(update,))
            self._engine.collective_rpc("finish_weight_update")
        except WeightSyncError:
            raise
        except Exception as error:
            raise EngineError(f"version {manifest.version} was applied in part: {error}") from error
        self._engine.set_weight_version(str(manifest.version))
        self._version = manifest.version
        if self._reset_kv and not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise EngineError(f"version {manifest.version}: vLLM did not reset its KV cache")

    def backend_receiver(self, transport: str) -> BackendReceiver:
        """This worker's end of a transport that is one of vLLM's backends."""
        return BackendReceiver(transport, self._engine.vllm_config)

    def shutdown(self) -> None:
        """End vLLM's executor."""
        self._engine.engine_core.shutdown()


def _sampled(completion: CompletionOutput) -> Sampled:
    spans = completion.weight_versions
    if spans is None or completion.logprobs is None:
        raise EngineError("vLLM reported no weight versions or no log-probabilities for a finished response")
    if completion.finish_reason not in ("stop", "length"):
        raise EngineError(f"response ended with {completion.finish_reason!r}; expected stop or length")
    reason: FinishReason = "stop" if completion.finish_reason == "stop" else "length"
    logprobs = completion.logprobs
    return Sampled(
        response_ids=np.asarray(completion.token_ids, dtype=np.int32),
        logprobs=np.asarray(logprobs.logprobs, dtype=np.float32)[logprobs.start_indices],
        version_spans=tuple(VersionSpan(start=s.start, stop=s.end, version=int(s.version)) for s in spans),
        finish_reason=reason,
        text=completion.text,
    )


def _keep_plain_linear_weights() -> None:
    """Stop vLLM's CPU path from prepacking linear weights.

    Packed layers ignore later changes of their parameter, silently; plain ones take a new version by pointer.
    """

    def plain(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear  # type: ignore[assignment]

    if not hasattr(vllm_linear, "dispatch_cpu_unquantized_gemm"):
        raise EngineError("this vLLM has no dispatch_cpu_unquantized_gemm; rlsys supports vllm 0.32.0")
    vllm_linear.dispatch_cpu_unquantized_gemm = plain
