"""vLLM serves exactly the policy that the learner holds, under every version, also when versions change mid-response.

The learner's side is what training uses: the Hugging Face model behind `Policy.token_logprobs`, in float32.
"""

import asyncio
import dataclasses
import gc
import inspect
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlsys.actors.rollout import Request
from rlsys.config import RunConfig, parse_config
from rlsys.config.schema import TinyModelConfig
from rlsys.engines.protocol import Sampled, Sampling
from rlsys.errors import ChecksumMismatch, EngineError, PromptRefused, WeightSyncError
from rlsys.learning.tiny import make_tiny
from rlsys.records import Prompt, RolloutGroup
from rlsys.versions import VersionSpan, WeightManifest
from rlsys.weights.buffer import Bytes
from rlsys.weights.transport import WeightTicket
from tests.integration.served import (
    CONTEXT,
    PROMPTS,
    Engines,
    LearnerSide,
    Published,
    Served,
    as_it_is,
    read_only,
    scattered,
)

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::FutureWarning:vllm.*")]

EXACT = 1e-4
"""Nats. Both sides are float32 and differ only in the order of additions."""

DIFFERENT = 1e-2
"""Nats. What a change of the weights must show at least, on the largest of many tokens."""

LONG = 60
"""Tokens of a response that lives through updates."""

UPDATES = 4


@pytest.fixture(scope="module", autouse=True)
def held_to_one_thread() -> Iterator[None]:
    """As after a warm start in this process: torch's number differs from OpenMP's own in every new thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose output head is, or is not, its embedding. Its vocabulary is not a multiple of 64."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny = TinyModelConfig(
        hidden_size=64, layers=2, heads=2, kv_heads=1, intermediate_size=160, tie_embeddings=request.param
    )
    make_tiny(tiny, "".join(map(chr, range(33, 127))), path, seed=1)
    return path


KEPT: list[Engines] = []


@pytest.fixture(scope="module")
def serve(directory: Path) -> Engines:
    """Engines on `directory`. They end with the process."""
    KEPT.append(Engines(directory))
    return KEPT[-1]


@pytest.mark.parametrize(("layout", "points"), [(as_it_is, True), (scattered, False)], ids=["pointing", "loading"])
def test_served_log_probabilities_are_the_learners_under_every_version(
    serve: Engines, layout: Callable[..., Published], points: bool
) -> None:
    served = serve(layout)
    assert served.gap(served.sample()) < EXACT
    names = [name for name, _ in served.learner.policy.named_tensors()]
    # What one learner step may change, in turn. Each must reach what is served, the output head included.
    for part in (*(n for n in names if "lm_head" in n), "embed_tokens", "self_attn", "bias", "mlp", "norm", ""):
        served.update(part, scale=0.2)
        assert served.engine.serving_version == served.learner.version
        sampled = served.sample()
        assert served.gap(sampled) < EXACT, part
        assert served.gap(sampled, age=1) > DIFFERENT, f"{part}: the old version would pass as well"
    assert served.points is points


def test_the_output_head_of_an_untied_model_is_published_and_a_tied_one_has_none(directory: Path) -> None:
    learner = LearnerSide(directory)
    published = {slot.name for slot in learner.published()[0].layout}
    assert ("lm_head.weight" in published) is not learner.policy.model.config.tie_word_embeddings


def test_greedy_answers_are_the_learners_argmax(serve: Engines) -> None:
    served = serve()
    served.update(scale=0.2)
    for prompt, (response,) in served.sample(samples=1, temperature=0.0).items():
        assert response.response_ids.tolist() == served.learner.greedy(prompt, response.response_ids)


def test_log_probabilities_are_those_after_temperature(serve: Engines) -> None:
    served = serve()
    sampled = served.sample(temperature=0.7)
    assert served.gap(sampled, temperature=0.7) < EXACT
    assert served.gap(sampled, temperature=1.0) > DIFFERENT


# -- in-flight updates -------------------------------------------------------------------------------------------------


def long_responses(served: Served) -> list[Sampled]:
    """Eight long responses to one prompt, with a new version after every few steps."""
    served.engine.add("long", PROMPTS[0], 8, Sampling(max_new_tokens=LONG, temperature=1.0))
    last, finished = served.learner.version + UPDATES, []
    while served.engine.busy:
        for _ in range(7):
            finished += [response for _, responses in served.engine.step() for response in responses]
        if served.learner.version < last and served.engine.busy:
            served.update(scale=0.1)
    assert len(finished) == 8
    assert max(len(response.version_spans) for response in finished) == UPDATES + 1, "none lived through all updates"
    return finished


def assert_tiles(spans: tuple[VersionSpan, ...], length: int) -> None:
    assert spans[0].start == 0
    assert spans[-1].stop == length
    assert all(a.stop == b.start and a.version < b.version for a, b in itertools.pairwise(spans))
    assert all(span.start < span.stop for span in spans)


def test_spans_tile_a_response_over_updates_and_nothing_is_aborted(serve: Engines) -> None:
    for response in long_responses(serve()):
        assert_tiles(response.version_spans, len(response.response_ids))
        assert len(response.logprobs) == len(response.response_ids)
        assert response.finish_reason == "stop" or len(response.response_ids) == LONG


def test_each_span_is_exact_under_its_version_with_the_cache_that_older_ones_left(serve: Engines) -> None:
    served = serve()
    for response in long_responses(served):
        expected = served.learner.logprobs_with_kept_cache(PROMPTS[0], response)
        np.testing.assert_allclose(response.logprobs, expected, rtol=0, atol=EXACT)
        first, *later = response.version_spans
        pure = np.concatenate(
            [
                served.learner.logprobs(PROMPTS[0], response.response_ids, span.version)[span.start : span.stop]
                for span in response.version_spans
            ]
        )
        np.testing.assert_allclose(response.logprobs[: first.stop], pure[: first.stop], rtol=0, atol=EXACT)
        if later:
            assert np.abs(pure - response.logprobs).max() > DIFFERENT, "keeping the cache made no difference"


def test_each_span_is_exact_under_its_version_alone_when_the_cache_is_recomputed(serve: Engines) -> None:
    served = serve(reset_kv_on_update=True)
    for response in long_responses(served):
        assert_tiles(response.version_spans, len(response.response_ids))
        for span in response.version_spans:
            expected = served.learner.logprobs(PROMPTS[0], response.response_ids, span.version)
            found, expected = response.logprobs[span.start : span.stop], expected[span.start : span.stop]
            np.testing.assert_allclose(found, expected, rtol=0, atol=EXACT)


def test_cached_prefixes_do_not_outlive_an_update(serve: Engines) -> None:
    served = serve(reset_kv_on_update=True, engine_options={"enable_prefix_caching": True})
    prompt = tuple(range(5, 45)) * 2  # long enough to fill blocks that a second request shares
    for _ in range(3):
        for key in ("first", "again"):
            served.engine.add(key, prompt, 2, Sampling(max_new_tokens=8, temperature=1.0))
            for _, responses in served.run():
                assert served.gap({prompt: responses}) < EXACT
        served.update(scale=0.1)


# -- refusals: nothing that is not whole and right is served -----------------------------------------------------------


@pytest.mark.parametrize(
    "prompt", [(5,) * CONTEXT, (5,) * 500, (), (5, 10_000)], ids=["full", "long", "empty", "unknown"]
)
def test_a_prompt_that_cannot_be_served_is_refused_and_the_engine_goes_on(
    serve: Engines, prompt: tuple[int, ...]
) -> None:
    served = serve()
    with pytest.raises(EngineError, match=f"prompt of {len(prompt)} tokens"):
        served.engine.add("bad", prompt, 2, Sampling(max_new_tokens=4, temperature=1.0))
    assert served.gap(served.sample()) < EXACT


@pytest.mark.parametrize("layout", [as_it_is, scattered], ids=["pointing", "loading"])
def test_a_version_that_lacks_a_parameter_is_refused_and_the_old_one_serves(
    serve: Engines, layout: Callable[..., Published]
) -> None:
    served = serve(layout)
    served.update()
    version = served.learner.version
    served.learner.change()
    manifest, buffer = served.layout(*served.learner.published())
    partial = dataclasses.replace(manifest, layout=tuple(slot for slot in manifest.layout if "norm" not in slot.name))
    with pytest.raises(WeightSyncError, match=f"version {version + 1}"):
        served.engine.apply(partial, buffer)
    assert served.engine.serving_version == version
    assert served.gap(served.sample(), age=1) < EXACT
    served.engine.apply(manifest, buffer)
    assert served.gap(served.sample()) < EXACT


def test_a_version_that_fails_half_way_is_no_refusal(serve: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some parameters are the new version's then. The driver stops the engine; here it is given the whole version."""
    served = serve(scattered)
    served.update()
    served.learner.change()
    manifest, buffer = served.layout(*served.learner.published())
    model = served.receiver.model
    load = model.load_weights

    def half(weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        load(itertools.islice(weights, 5))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "load_weights", half)
    with pytest.raises(EngineError, match="applied in part: out of memory") as error:
        served.engine.apply(manifest, buffer)
    assert not isinstance(error.value, WeightSyncError)
    monkeypatch.undo()
    served.engine.apply(manifest, buffer)
    assert served.gap(served.sample()) < EXACT


def test_a_cache_that_is_not_reset_is_no_refusal(serve: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(reset_kv_on_update=True)
    served.learner.change()
    manifest, buffer = served.layout(*served.learner.published())
    monkeypatch.setattr(served.engine._engine, "reset_prefix_cache", lambda **_: False)
    with pytest.raises(EngineError, match="did not reset its KV cache"):
        served.engine.apply(manifest, buffer)


class GivenBytes:
    """A transport whose payload is the bytes themselves."""

    def receive(self, payload: Bytes) -> Bytes:
        return payload


@dataclasses.dataclass
class Worker:
    """The rollout actor's own class without Ray around it, and the learner whose versions it takes."""

    actor: Any
    learner: LearnerSide

    async def generate(self, prompt: Prompt) -> RolloutGroup:
        """One group; a client of its own for every prompt. Raises what became of it."""
        client = f"prompt {prompt.index}"
        await self.actor.submit(client, [Request(key=7, slot=prompt.index, attempt=1, prompt=prompt)])
        [(key, outcome)], groups = await self.actor.collect(client)
        assert key == 7
        if isinstance(outcome, BaseException):
            assert groups == []
            raise outcome
        (group,) = groups
        assert outcome == group.summary()
        return group


@pytest.fixture(scope="module")
def worker(directory: Path) -> Worker:
    from rlsys.actors import rollout

    config: RunConfig = parse_config(
        {
            "model": {"path": str(directory), "max_context": CONTEXT},
            "task": {"name": "arithmetic"},
            "rollout": {"samples_per_prompt": 3, "max_new_tokens": LONG, "kv_cache_gib": 1 / 128},
            "resources": {"pin_cores": False},
        }
    )
    gc.freeze()
    actor_class: Any = rollout.RolloutActor
    actor = actor_class.__ray_metadata__.modified_class("rollout-0", 0, 0, str(directory), config, 0)
    actor._transport = GivenBytes()
    return Worker(actor, LearnerSide(directory))


def prompt(index: int = 0, token_ids: tuple[int, ...] = PROMPTS[0]) -> Prompt:
    return Prompt(epoch=0, index=index, text="", token_ids=token_ids, answer="")


def flipped(place: Callable[[int], int]) -> Callable[[Bytes], Bytes]:
    def flip(buffer: Bytes) -> Bytes:
        changed = buffer.copy()
        changed[place(len(changed))] ^= 1
        return read_only(changed)

    return flip


DAMAGE: dict[str, Callable[[Bytes], Bytes]] = {
    "truncated": lambda buffer: read_only(buffer[:-1]),
    "empty": lambda buffer: read_only(buffer[:0]),
    "one byte more": lambda buffer: read_only(np.append(buffer, np.uint8(0))),
    "first bit": flipped(lambda size: 0),
    "a bit in the middle": flipped(lambda size: size // 2),
    "last bit": flipped(lambda size: size - 1),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_weights_are_refused_before_the_engine_is_touched(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Bytes], Bytes]
) -> None:
    actor, learner = worker.actor, worker.learner
    before = learner.version
    learner.change()
    manifest, buffer = learner.published()
    engine = actor._driver._engine
    touched: list[int] = []
    apply = engine.apply

    def watched(manifest: WeightManifest, buffer: Bytes) -> None:
        touched.append(manifest.version)
        apply(manifest, buffer)

    monkeypatch.setattr(engine, "apply", watched)

    async def scenario() -> None:
        with pytest.raises(ChecksumMismatch, match=f"version {before + 1}"):
            await actor.apply(WeightTicket(manifest=manifest, payload=damage(buffer)))
        assert touched == []
        group = await worker.generate(prompt())
        for rollout in group.rollouts:
            assert {span.version for span in rollout.version_spans} == {before}
            expected = learner.logprobs(PROMPTS[0], rollout.response_ids, before)
            np.testing.assert_allclose(rollout.behavior_logprobs, expected, rtol=0, atol=EXACT)
        await actor.apply(WeightTicket(manifest=manifest, payload=buffer))
        assert touched == [before + 1]
        assert (await actor.stats()).serving_version == before + 1

    asyncio.run(scenario())


def test_a_worker_takes_versions_while_it_generates_and_every_request_finishes(worker: Worker) -> None:
    actor, learner = worker.actor, worker.learner
    last = learner.version + 6

    async def scenario() -> list[RolloutGroup]:
        requests = [asyncio.ensure_future(worker.generate(prompt(i))) for i in range(4)]
        while learner.version < last:
            await asyncio.sleep(0.02)
            learner.change()
            manifest, buffer = learner.published()
            assert await actor.apply(WeightTicket(manifest=manifest, payload=buffer)) >= 0
        return await asyncio.gather(*requests)

    groups = asyncio.run(scenario())
    assert [group.slot for group in groups] == [0, 1, 2, 3]
    for group in groups:
        assert len(group.rollouts) == 3
        for rollout in group.rollouts:
            assert_tiles(rollout.version_spans, len(rollout.response_ids))
            assert rollout.version_spans[-1].version <= last


def test_a_prompt_that_cannot_be_served_fails_alone(worker: Worker) -> None:
    async def scenario() -> None:
        prompts = [prompt(0), prompt(1, (5,) * 500), prompt(2, PROMPTS[2])]
        results: list[Any] = await asyncio.gather(*(worker.generate(p) for p in prompts), return_exceptions=True)
        assert isinstance(results[1], PromptRefused), results
        for group in (results[0], results[2], await worker.generate(prompt(3))):
            assert len(group.rollouts) == 3

    asyncio.run(scenario())


# -- number formats ----------------------------------------------------------------------------------------------------


def test_a_bfloat16_engine_serves_float32_parameters_rounded(serve: Engines) -> None:
    rounded_here = serve(publish="bfloat16", dtype="bfloat16")
    rounded_there = serve(publish="float32", dtype="bfloat16")
    answers = []
    for served in (rounded_here, rounded_there):
        served.update(scale=0.2)
        assert served.gap(served.sample()) < 0.4
        assert served.gap(served.sample(), age=1) > 1, "the old version would pass as well"
        answers.append(served.sample(samples=1, temperature=0.0, tokens=8))
    assert rounded_here.points
    assert not rounded_there.points
    for prompt in PROMPTS:
        (here,), (there,) = answers[0][prompt], answers[1][prompt]
        assert here.response_ids.tolist() == there.response_ids.tolist()
        np.testing.assert_array_equal(here.logprobs, there.logprobs)


# -- what of vLLM's insides the engine relies on -----------------------------------------------------------------------


def test_vllms_linear_layers_keep_their_weights(serve: Engines) -> None:
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    model = serve().receiver.model
    assert utils.dispatch_cpu_unquantized_gemm.__module__ == "rlsys.engines.vllm_engine"
    layers = [module for module in model.modules() if isinstance(module, LinearBase | ParallelLMHead)]
    assert len(layers) >= 2 * 4
    for layer in layers:
        assert layer.cpu_linear is torch.nn.functional.linear
        assert layer.weight.numel() > 0, "prepacked: changes of this parameter would not be served"
    assert all(parameter.numel() > 0 for parameter in model.parameters())


def test_vllms_names_that_the_engine_uses_are_there() -> None:
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.outputs import CompletionOutput
    from vllm.v1.worker.gpu_worker import Worker

    from rlsys.engines import receiver

    receiver.register()
    receiver.register()
    assert receiver.BACKEND in WeightTransferEngineFactory._registry
    assert WeightTransferEngine.__abstractmethods__ <= set(vars(receiver.BufferReceiver))
    for name in ("start_weight_update", "update_weights", "finish_weight_update", "init_weight_transfer_engine"):
        assert callable(getattr(Worker, name))
    for name in ("set_weight_version", "collective_rpc", "has_unfinished_requests", "add_request", "step"):
        assert callable(getattr(LLMEngine, name))
    assert "reset_running_requests" in inspect.signature(LLMEngine.reset_prefix_cache).parameters
    arguments = {field.name for field in dataclasses.fields(EngineArgs)}
    assert {"weight_transfer_config", "logprobs_mode", "async_scheduling", "kv_cache_memory_bytes"} <= arguments
    assert "weight_versions" in inspect.signature(CompletionOutput).parameters
    assert {"flat_logprobs", "output_kind"} <= set(SamplingParams.__struct_fields__)


def test_a_finished_response_carries_flat_log_probabilities_and_version_spans(serve: Engines) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    served = serve()
    engine = served.engine._engine
    engine.set_weight_version("4711")
    params = SamplingParams(max_tokens=3, logprobs=0, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY)
    engine.add_request("0", {"prompt_token_ids": [5, 6]}, params)
    (output,) = [output for _ in range(3) for output in engine.step()]
    engine.set_weight_version(str(served.learner.version))
    (completion,) = output.outputs
    assert output.finished
    (span,) = completion.weight_versions
    assert (span.version, span.start, span.end) == ("4711", 0, len(completion.token_ids))
    starts = completion.logprobs.start_indices
    assert len(starts) == len(completion.token_ids)
    assert [completion.logprobs.token_ids[i] for i in starts] == list(completion.token_ids)
