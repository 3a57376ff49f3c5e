"""The claims of the papers on RL for language models, each reproduced: predicted, measured, drawn."""

from rlsys.lab.claims.allocation import gvm_allocation, log_allocation
from rlsys.lab.claims.compounding import compounding_errors
from rlsys.lab.claims.divergences import chain_rule, off_policy_kl
from rlsys.lab.claims.outcome import Claim
from rlsys.lab.claims.sampling import log_objective, silent_groups
from rlsys.lab.claims.trust import prefix_drift, stale_values, surrogate
from rlsys.lab.claims.variance import baseline, step_rewards
from rlsys.lab.claims.views import same_gradient_on_policy, unbiased_or_low_variance
from rlsys.lab.claims.weights import clipping, linearization, weight_variance

_TABLE = (
    Claim(
        number=1,
        statement="On-policy, the bandit and the token-level gradient are the same",
        source="B",
        predicted="difference 0",
        measure=same_gradient_on_policy,
    ),
    Claim(
        number=2,
        statement="The variance of the sequence weight grows exponentially with T, the token weight's does not",
        source="A B C",
        predicted="Var w = Π(1 + χ²_t) − 1 where χ²_t does not depend on the prefix",
        measure=weight_variance,
    ),
    Claim(
        number=3,
        statement="Π r ≈ 1 + Σ(r − 1) while the policies are close",
        source="B C",
        predicted="error of second order in the drift; where it leaves 1% and 10%",
        measure=linearization,
    ),
    Claim(
        number=4,
        statement="The sequence KL is the sum of expected token KLs and grows linearly with T",
        source="A",
        predicted="chain rule, exact; slope ε at fixed length and prefix-independent KL",
        measure=chain_rule,
    ),
    Claim(
        number=5,
        statement="Off-policy L_seq is unbiased, L_tok is not but usually varies less",
        source="A B",
        predicted="bias of first order in the drift, 0 at T = 1; lower MSE until a drift that depends on T and n",
        measure=unbiased_or_low_variance,
    ),
    Claim(
        number=6,
        statement="Clipping the sequence weight hits nearly all long responses, clipping each token few tokens",
        source="C",
        predicted="the share of responses goes to 1 with T, the share of tokens stays",
        measure=clipping,
    ),
    Claim(
        number=7,
        statement="States (prefixes) drift with the policy in the token view, prompts never do",
        source="A B",
        predicted="total variation 0 for prompts; for prefixes it grows with depth, within √(KL/2)",
        measure=prefix_drift,
    ),
    Claim(
        number=8,
        statement="Q of the old policy is pessimistic at prefixes where the policy has improved",
        source="B",
        predicted="its sign, and its size by the performance difference lemma, per prefix",
        measure=stale_values,
    ),
    Claim(
        number=9,
        statement="The surrogate agrees with E[r] to first order at π_old, and the KL bounds its error",
        source="B",
        predicted="equal slopes; error of second order; within T(T−1)·max KL/2",
        measure=surrogate,
    ),
    Claim(
        number=10,
        statement="A baseline leaves the mean gradient and lowers its variance",
        source="C",
        predicted="exact equality of means; variance ratio below 1",
        measure=baseline,
    ),
    Claim(
        number=11,
        statement="Per-step weights with per-step rewards vary less than one trajectory weight",
        source="A",
        predicted="variance ratio below 1, typically; no theorem",
        measure=step_rewards,
    ),
    Claim(
        number=12,
        statement="Signal loss: at p = 0.1 and n = 8, 43% of groups teach nothing",
        source="A",
        predicted="0.9^8 + 0.1^8 = 0.4305",
        measure=silent_groups,
    ),
    Claim(
        number=13,
        statement="E[log p] weights prompts by 1/p; sampling until K successes does it without dividing",
        source="A",
        predicted="E[N] = K/p; mean gradient ∇log p",
        measure=log_objective,
    ),
    Claim(
        number=14,
        statement="n* ∝ √((1−p)/p) minimises the variance of the log objective under a fixed budget",
        source="A",
        predicted="no better allocation by brute force",
        measure=log_allocation,
    ),
    Claim(
        number=15,
        statement="GVM's 1/(n p) estimator is unbiased, and its allocation lowers the variance where norms differ",
        source="A",
        predicted="bias 0; ratios to uniform and to 1/√p below 1",
        measure=gvm_allocation,
    ),
    Claim(
        number=16,
        statement="The off-policy mean of log π/π_ref is not the KL; w(y) repairs it, r_t only the token part",
        source="C (9)",
        predicted="bias 0 with w; linear in the drift without, and with r_t",
        measure=off_policy_kl,
    ),
    Claim(
        number=17,
        statement="Only on-policy data keeps covering the policy's own mistakes; fixed demonstrations compound errors",
        source="D",
        predicted="error ∝ T on-policy, up to T² on demonstrations",
        measure=compounding_errors,
    ),
)

CLAIMS: dict[int, Claim] = {claim.number: claim for claim in _TABLE}
