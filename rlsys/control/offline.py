"""Evaluating a checkpoint without a cluster: the rollout engine and the task's scorer in this process."""

import asyncio
import os
from pathlib import Path

from rlsys.config.schema import RunConfig
from rlsys.control.evaluation import Evaluation
from rlsys.control.preflight import check_config, check_model_directory, load_prompts
from rlsys.records import Response


def evaluate_checkpoint(checkpoint: Path, config: RunConfig) -> Evaluation:
    """Greedy accuracy of the model at `checkpoint` on the task's held-out prompts, all at version 0."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    check_config(config)
    check_model_directory(str(checkpoint.absolute()), config.model.max_context)
    prompts = load_prompts(config, str(checkpoint)).held_out

    from rlsys.engines.driver import EngineDriver
    from rlsys.engines.protocol import Sampled, Sampling
    from rlsys.engines.vllm_engine import VllmEngine
    from rlsys.rewards import resolve_reward
    from rlsys.tasks import build_task

    reward = resolve_reward(config.reward.function, build_task(config.task, config.seed).score)
    driver = EngineDriver(VllmEngine(str(checkpoint), config.model, config.rollout, seed=config.seed))
    sampling = Sampling(max_new_tokens=config.rollout.max_new_tokens, temperature=0.0)

    async def answer() -> list[list[Sampled]]:
        return await asyncio.gather(*(driver.generate(prompt.token_ids, 1, sampling) for prompt in prompts))

    try:
        responses = [group[0] for group in asyncio.run(answer())]
    finally:
        driver.close()
    rewards = [
        reward(prompt, Response(text=response.text, finished=response.finish_reason == "stop"))
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    return Evaluation(
        accuracy=sum(rewards) / len(rewards),
        prompts=len(rewards),
        response_tokens=sum(len(r.response_ids) for r in responses) / len(responses),
        oldest_version=0,
        newest_version=0,
    )
