"""Every metric a run reports: name, unit, meaning. One definition each; everything else reads it from here.

Names that end in `by_staleness/{0,1,2,3,4+}` are a metric of the same name restricted to tokens (or, for
sequence metrics, responses) of that staleness, those in `by_sign/{positive,negative}` to tokens whose
advantage has that sign; an empty part is null.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """`by_staleness`, `by_sign`: also reported per staleness bucket, and by the sign of the advantage.

    `additive`: sums over steps mean something, so that Prometheus gets a counter too.
    """

    name: str
    unit: str
    meaning: str
    by_staleness: bool = False
    by_sign: bool = False
    additive: bool = False


PARTS = {"by_staleness": ("0", "1", "2", "3", "4+"), "by_sign": ("positive", "negative")}
"""How a metric may be restricted, and to what."""

_RESTRICTED = re.compile(r"(.+?)(?:/(by_staleness|by_sign)/(.+))?")

_METRICS = (
    Metric("reward/mean", "reward", "mean reward of the batch's responses, before any KL term"),
    Metric("reward/std", "reward", "standard deviation over the batch's responses"),
    Metric("reward/pass_rate", "fraction", "responses with the full reward, 1 or more"),
    Metric("eval/accuracy", "reward", "mean reward of one greedy response per held-out prompt"),
    Metric("eval/prompts", "prompts", "held-out prompts evaluated"),
    Metric("eval/response_tokens", "tokens", "mean length of the greedy responses"),
    Metric("eval/oldest_version", "version", "oldest policy version that sampled an evaluated token"),
    Metric("eval/newest_version", "version", "newest policy version that sampled an evaluated token"),
    Metric(
        "staleness/mean", "versions", "learner version at consumption less the version that sampled it, over tokens"
    ),
    Metric("staleness/p95", "versions", "95th percentile over tokens"),
    Metric("staleness/max", "versions", "oldest token of the batch"),
    Metric("staleness/in_flight/mean", "versions", "part of the staleness gained before the response finished"),
    Metric("staleness/in_queue/mean", "versions", "part of the staleness gained after the response finished"),
    Metric("staleness/bound", "versions", "configured bound, staleness.max"),
    Metric("staleness/window", "versions", "ages the admitted prompts allow for now; at most the bound"),
    Metric("staleness/violations", "tokens", "trained tokens beyond the bound; always 0"),
    Metric("staleness/rejected_groups", "groups", "groups rejected for age, or for a step that was not finite"),
    Metric("staleness/rejected_tokens", "tokens", "response tokens of the rejected groups, since the start"),
    Metric("staleness/rejected_length", "tokens", "mean response length of the rejected, since the start"),
    Metric("staleness/rejected_reward", "reward", "mean reward of the rejected, since the start"),
    Metric("staleness/trained_length", "tokens", "mean response length of the trained, since the start"),
    Metric("staleness/trained_reward", "reward", "mean reward of the trained, since the start"),
    Metric("importance/ess_token", "fraction", "(Σr)²/(N Σr²) over tokens, r = π_θ/μ raw", True),
    Metric("importance/ess_sequence", "fraction", "(Σw)²/(G Σw²) over responses, w = Π r", True),
    Metric(
        "importance/ess_token_truncated", "fraction", "ESS over tokens after truncation at the correction's cap", True
    ),
    Metric("importance/ess_sequence_truncated", "fraction", "ESS over responses after truncation at the cap", True),
    Metric("importance/chi2_token", "1", "mean(r²) - 1 over tokens", True),
    Metric("importance/chi2_sequence", "1", "mean(w²) - 1 over responses", True),
    Metric("importance/mean_weight_token", "1", "mean r over tokens; 1 in expectation", True),
    Metric("importance/mean_weight_sequence", "1", "mean w over responses; 1 in expectation", True),
    Metric("importance/k1", "nats", "mean(log μ - log π_θ) per token", True),
    Metric("importance/k3", "nats", "mean(r - log r - 1) per token", True),
    Metric("importance/log_ratio_p01", "nats", "1st percentile of log r over tokens", True),
    Metric("importance/log_ratio_p50", "nats", "median of log r over tokens", True),
    Metric("importance/log_ratio_p99", "nats", "99th percentile of log r over tokens", True),
    Metric("importance/log_ratio_abs_max", "nats", "largest |log r| of a token", True),
    Metric("importance/linearization_gap", "1", "mean |Π r - 1 - Σ(r - 1)| over responses", True),
    Metric(
        "importance/clip_fraction", "fraction", "tokens whose clipped branch acts (their gradient is cut)", True, True
    ),
    Metric(
        "importance/outside_fraction", "fraction", "tokens whose ratio is beyond the objective's bounds", True, True
    ),
    Metric("importance/masked_fraction", "fraction", "tokens the correction masked", True, True),
    Metric("importance/truncated_fraction", "fraction", "tokens whose correction weight was truncated", True, True),
    Metric(
        "importance/clamped_fraction",
        "fraction",
        "tokens whose log-ratio met the ±20 clamp: their own, their response's, or that of the KL term",
    ),
    *(
        Metric(f"split/{part}/{name}", "nats", f"{meaning} of {what}, over {tokens}")
        for part, what, tokens in (
            ("drift", "log π_θ - log π_V, what moved within the step", "probed tokens"),
            ("lag", "log π_V - log π_v, what moved since version v sampled the token", "probed tokens"),
            ("engine", "log π_v - log μ, where the engine computes otherwise", "tokens of first spans"),
            (
                "engine_later_spans",
                "log π_v - log μ where the KV cache is partly older too",
                "tokens of later version spans",
            ),
        )
        for name, meaning in (("mean", "mean"), ("abs_mean", "mean absolute value"), ("k3", "k3"))
    ),
    Metric("split/tokens", "tokens", "tokens that were probed"),
    Metric("split/later_tokens", "tokens", "those of them after their response's first version"),
    Metric("split/seconds", "s", "what probing the batch took, off the learner's path"),
    Metric("audit/cosine", "1", "cosine of the corrected stale gradient and a fresh on-policy one"),
    Metric("audit/norm_ratio", "1", "norm of the corrected stale gradient over that of the fresh one"),
    Metric("audit/cosine_floor", "1", "cosine of two fresh gradients: what sampling noise alone leaves"),
    Metric("kl/reference_k1", "nats", "mean(log π_θ - log π_ref) per token"),
    Metric("kl/reference_k3", "nats", "mean(e^d - d - 1), d = log π_ref - log π_θ, per token"),
    Metric("kl/sequence_mean", "nats", "log π_θ - log π_ref summed over a response, mean over responses"),
    Metric("kl/coef", "1", "coefficient β of the KL term"),
    Metric("advantage/mean", "reward", "mean advantage over responses"),
    Metric("advantage/std", "reward", "standard deviation of the advantage over responses"),
    Metric("advantage/zero_variance_fraction", "fraction", "groups whose rewards are all equal: they carry no signal"),
    Metric("policy/entropy", "nats", "mean entropy of the policy's next-token distribution at trained tokens"),
    Metric("policy/grad_norm", "1", "gradient norm before clipping"),
    Metric("policy/lr", "1", "learning rate of the step"),
    Metric("policy/loss", "1", "loss of the step, KL term included"),
    Metric("policy/packing_fill", "fraction", "share of the learner's forward pass spent on real tokens"),
    Metric("policy/response_tokens", "tokens", "mean response length"),
    Metric("weight_sync/publish_s", "s", "packing the parameters and putting them into the store"),
    Metric("weight_sync/apply_s", "s", "from sending a version to its acknowledgement, slowest worker's latest"),
    Metric(
        "weight_sync/pause_s",
        "s",
        "decoding stood still for syncs, all workers, since the previous step",
        additive=True,
    ),
    Metric("weight_sync/bytes", "bytes", "size of one version"),
    Metric("weight_sync/acked", "workers", "workers that serve the newest published version"),
    Metric("weight_sync/serving_lag_max", "versions", "learner version less the slowest worker's serving version"),
    Metric("throughput/generated_tokens_per_s", "tokens/s", "tokens of finished responses, all workers"),
    Metric("throughput/trained_tokens_per_s", "tokens/s", "prompt and response tokens the learner consumed"),
    Metric("throughput/step_s", "s", "wall time from the previous learner step's end to this one's", additive=True),
    Metric("throughput/learner_s", "s", "wall time inside the learner's update", additive=True),
    Metric("throughput/learner_idle_s", "s", "wall time the learner waited for a batch", additive=True),
    Metric(
        "throughput/rollout_idle_fraction",
        "fraction",
        "share of time rollout workers had nothing to do",
    ),
    Metric("ledger/waiting", "groups", "admitted, nobody works on them"),
    Metric("ledger/in_flight", "groups", "being sampled or scored"),
    Metric("ledger/finished", "groups", "scored, waiting for the learner"),
    Metric("ledger/learning", "groups", "in a batch"),
    Metric("ledger/admitted", "groups", "admitted since the start"),
    Metric("ledger/trained", "groups", "trained since the start"),
    Metric("ledger/rejected", "groups", "rejected or failed since the start"),
    Metric("ledger/lost", "groups", "unaccounted for; always 0"),
    Metric("workers/rollout/desired", "workers", "rollout workers there should be"),
    Metric("workers/rollout/ready", "workers", "rollout workers that take work; a joining or a leaving one does not"),
    Metric("workers/rollout/restarts", "workers", "rollout workers started in place of a dead one, since the start"),
    Metric("workers/reward/desired", "workers", "reward workers there should be"),
    Metric("workers/reward/ready", "workers", "reward workers that take work; a joining or a leaving one does not"),
    Metric("workers/reward/restarts", "workers", "reward workers started in place of a dead one, since the start"),
    Metric("alarms/raised", "alarms", "alarms that stand"),
)

CATALOGUE: dict[str, Metric] = {metric.name: metric for metric in _METRICS}


def definition(key: str) -> Metric:
    """The metric behind a key, restricted or not. Raises KeyError for a name nobody defined."""
    match = _RESTRICTED.fullmatch(key)
    if match is None:
        raise KeyError(key)
    name, kind, part = match.groups()
    metric = CATALOGUE[name]
    if kind and not (getattr(metric, kind) and part in PARTS[kind]):
        raise KeyError(key)
    return metric
