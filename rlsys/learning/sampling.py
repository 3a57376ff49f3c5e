"""Responses from the learner's own model: slow beside an engine, but from exactly the policy in hand."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlsys.algo.logprobs import token_logprobs
from rlsys.learning.policy import Policy
from rlsys.records import FloatArray, IntArray, Prompt, Rollout, RolloutGroup
from rlsys.versions import PolicyVersion, VersionSpan


def end_tokens(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a response, as the rollout engine has them: the tokenizer's and `generation_config.json`'s."""
    configured = getattr(policy.model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in (tokenizer.eos_token_id, *listed) if token is not None)


@torch.no_grad()
def sample_groups(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    version: PolicyVersion = 0,
    micro_batch_tokens: int = 8192,
) -> list[RolloutGroup]:
    """`samples` independent responses to every prompt, one group each, in the prompts' order.

    y_t ~ π(· | x, y_<t) = softmax(z_t/τ) over the whole vocabulary until a token ends the response, which is then
    its last token ("stop"), or until `max_new_tokens` ("length"). `behavior_logprobs` are log π of the sampled
    tokens, computed in float32 at least. Groups say that `version` sampled them. `micro_batch_tokens` bounds the
    tokens in memory at once; it and the seed decide which samples are drawn.
    """
    started = time.time()
    generator = torch.Generator(policy.device).manual_seed(seed)
    ends = end_tokens(policy, tokenizer)
    asked = [prompt.token_ids for prompt in prompts for _ in range(samples)]
    longest = max((len(prompt) for prompt in asked), default=0) + max_new_tokens
    rows = max(1, micro_batch_tokens // longest)
    training = policy.model.training
    policy.model.train(False)  # gradient checkpointing refuses a cache in training mode; dropout is off in either
    try:
        drawn = [
            response
            for start in range(0, len(asked), rows)
            for response in _sample(
                policy, asked[start : start + rows], max_new_tokens, temperature, tuple(ends), generator
            )
        ]
    finally:
        policy.model.train(training)
    finished = time.time()
    groups = []
    for slot, prompt in enumerate(prompts):
        rollouts = tuple(
            _rollout(tokenizer, sample, ids, logprobs, ends, version)
            for sample, (ids, logprobs) in enumerate(drawn[slot * samples : (slot + 1) * samples])
        )
        groups.append(
            RolloutGroup(
                slot=slot,
                attempt=0,
                worker="learner",
                prompt=prompt,
                rollouts=rollouts,
                started_at=started,
                finished_at=finished,
            )
        )
    return groups


def _sample(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    ends: Sequence[int],
    generator: torch.Generator,
) -> list[tuple[IntArray, FloatArray]]:
    """One response to each prompt: ids and log-probabilities, [T] each. Rows are padded on the left."""
    device, width = policy.device, max(map(len, prompts))
    padded = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    seen = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids, mask = torch.tensor(padded, device=device), torch.tensor(seen, device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ending = torch.tensor(ends, device=device)
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    lengths = torch.zeros(len(prompts), dtype=torch.int64, device=device)
    tokens, logprobs = [], []
    cache = None
    for _ in range(max_new_tokens):
        logits, cache = _next_logits(policy, ids, mask, positions, cache)
        token = torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)
        tokens.append(token)
        logprobs.append(token_logprobs(logits, token.squeeze(-1), temperature))
        lengths += running
        running &= ~torch.isin(token.squeeze(-1), ending)
        if not running.any():
            break
        ids, positions = token, positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=-1)
    all_ids = torch.cat(tokens, dim=-1).cpu().numpy().astype(np.int32)
    all_logprobs = torch.stack(logprobs, dim=-1).cpu().numpy()
    return [(all_ids[i, :n], all_logprobs[i, :n]) for i, n in enumerate(lengths.tolist())]


def _next_logits(
    policy: Policy, ids: Tensor, mask: Tensor, positions: Tensor, cache: object | None
) -> tuple[Tensor, object]:
    """Logits after the last column, [rows, V], and the grown cache. The head sees no other column if it need not."""
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "past_key_values": cache,
        "use_cache": True,
    }
    if not policy.direct_head:
        output = policy.model(**inputs)
        return output.logits[:, -1], output.past_key_values
    output = policy.model.base_model(**inputs)
    head = policy.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head(output.last_hidden_state[:, -1]), output.past_key_values


def _rollout(
    tokenizer: PreTrainedTokenizerBase,
    sample: int,
    ids: IntArray,
    logprobs: FloatArray,
    ends: frozenset[int],
    version: PolicyVersion,
) -> Rollout:
    """Its text is without the token that ended it and without special ones, as the engine's."""
    stopped = int(ids[-1]) in ends
    said = ids[:-1] if stopped else ids
    return Rollout(
        sample=sample,
        response_ids=ids,
        behavior_logprobs=logprobs,
        loss_mask=np.ones(len(ids), dtype=np.bool_),
        version_spans=(VersionSpan(start=0, stop=len(ids), version=version),),
        finish_reason="stop" if stopped else "length",
        text=str(tokenizer.decode(said.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)),
    )
