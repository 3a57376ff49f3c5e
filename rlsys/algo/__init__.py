"""The mathematics of rlsys: pure functions on tensors; torch and the standard library only.

    logprobs      logits -> log π of the sampled tokens, entropy
    importance    the primitives of a weight: clamped exponential, sums over a response
    batch         what a loss is given and returns; REDUCTIONS
    corrections   CORRECTIONS: what q = π_V/μ allows, fixed before the step
    objectives    OBJECTIVES: policy_loss, dpo_loss
    divergence    KL_ESTIMATORS: kl_loss, KL as a reward, KL_SCHEDULES
    advantages    ADVANTAGES: rewards -> one advantage per response; gae and step per token
    staleness     versions of tokens, their age, the bound on it
    diagnostics   numbers about weights: ESS, χ², tails, by staleness
    budgets       BUDGETS, ALLOCATIONS: how many samples a prompt deserves

Layout everywhere: the tokens of all responses concatenated, [N], with `response_index` [N] naming the
response each belongs to; a response is contiguous and never split. `loss_mask` is True on sampled tokens.
"""
