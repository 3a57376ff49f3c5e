"""The estimator lab: exact answers about policies small enough to enumerate, and what they say of the real losses.

    tree         every response of a small tabular policy; sampling
    exact        J, ∇J, KL, χ², visits, Q: finite sums, no sampling
    estimators   the gradient that `rlsys.algo.policy_loss` gives, per response, enumerated or sampled
    staleness    a learner that really takes steps, so that data becomes old
    estimate     numbers with intervals
    study        objective × correction × staleness: bias, variance, MSE, cosine
    claims/      the claims of the papers, each predicted, measured and drawn
    report       results as JSON, Markdown and pictures
    page         docs/choosing-an-objective.md, written from results

Nothing here re-implements a loss: what is measured is the code that trains.
"""
