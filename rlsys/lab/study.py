"""Objective × correction × staleness: how far each estimate of ∇J is from the truth, and why.

A task is a random verifiable reward and a learner that trains on it. Its last policy π_θ is where the gradient is
wanted; the data is of its own earlier policies, μ = π_{θ−k}. (With the drift `aimless` the policy moves as far in a
random direction instead, for comparison.) For the mean ĝ of n responses of μ, in units of
‖∇J‖ (‖∇J‖² for the last two):

    bias       ‖E ĝ − ∇J‖               variance   E‖ĝ − E ĝ‖²
    mse        E‖ĝ − ∇J‖² = bias² + variance

    cosine         between E ĝ and ∇J: the direction that infinitely many responses would give
    batch_cosine   E cos(ĝ, ∇J): the direction that n responses give

All are enumerated but `batch_cosine`, and but everything of `m2`, whose mask is a property of the whole batch:
these are measured on sampled batches, the same for every estimator. Intervals are over tasks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlsys.algo.corrections import CORRECTIONS, SEQUENCE_OBJECTIVES, Correction, compute_correction
from rlsys.algo.objectives import OBJECTIVES
from rlsys.errors import ConfigError
from rlsys.lab import exact
from rlsys.lab.estimate import Estimate, mean
from rlsys.lab.estimators import (
    Moments,
    Situation,
    batch_gradients,
    coefficients,
    moments,
    response_coefficients,
)
from rlsys.lab.staleness import aimless_steps, learner_steps
from rlsys.lab.tree import make_tree, random_policy, random_rewards, sample, seeded

DRIFT = ("learner", "aimless")
MEASURES = ("bias", "variance", "mse", "cosine", "batch_cosine")
DISTANCES = ("sequence_kl", "sequence_chi2", "token_chi2")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySettings:
    """What to study.

    drift: what moves the policy, a name in DRIFT. staleness: steps between μ and the policy when the learner step
    began. samples: responses per estimate.
    inner_steps: further steps inside the learner step, from π_V to π_θ (0: one update per batch). tasks: random
    tasks averaged over. batches: sampled batches behind each sampled number.
    """

    vocabulary: int = 4
    length: int = 6
    ends: bool = False
    staleness: tuple[int, ...] = (0, 1, 4, 16)
    objectives: tuple[str, ...] = tuple(OBJECTIVES)
    corrections: tuple[str, ...] = tuple(CORRECTIONS)
    samples: tuple[int, ...] = (16, 64, 256)
    inner_steps: int = 0
    tasks: int = 8
    batches: int = 50
    drift: str = "learner"
    learning_rate: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError on an unknown name or an empty or impossible number."""
        for field, names, known in (
            ("objectives", self.objectives, OBJECTIVES),
            ("drift", (self.drift,), DRIFT),
            ("corrections", self.corrections, CORRECTIONS),
        ):
            for name in names:
                if name not in known:
                    raise ConfigError(f"lab study: {field}={name!r}: allowed are {', '.join(known)}")
        for field, numbers, least in (
            ("staleness", self.staleness, 0),
            ("samples", self.samples, 1),
            ("inner_steps", (self.inner_steps,), 0),
            ("tasks", (self.tasks,), 2),
            ("batches", (self.batches,), 2),
        ):
            if not numbers or min(numbers) < least:
                raise ConfigError(f"lab study: {field}={numbers}: each must be at least {least}")

    @property
    def estimators(self) -> list[tuple[str, str]]:
        """(objective, correction) pairs; token masks are no corrections of sequence objectives."""
        return [(o, c) for c in self.corrections for o in self.objectives if allowed(o, c)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRow:
    """One estimator at one staleness and number of responses, averaged over tasks."""

    objective: str
    correction: str
    staleness: int
    samples: int
    enumerated: bool
    """False where bias, variance, mse and cosine come from sampled batches too."""
    measures: dict[str, Estimate]
    """By the names in MEASURES."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyResult:
    """Rows in the order correction, objective, staleness, samples; and how far the policies drifted."""

    settings: StudySettings
    rows: tuple[StudyRow, ...]
    distance: dict[int, dict[str, Estimate]]
    """staleness -> by the names in DISTANCES: KL(π_θ‖μ) in nats per response, χ² of w(y) and of r_t under μ."""

    def row(self, objective: str, correction: str, staleness: int, samples: int) -> StudyRow:
        """Raises KeyError where the study has no such row."""
        wanted = (objective, correction, staleness, samples)
        for row in self.rows:
            if (row.objective, row.correction, row.staleness, row.samples) == wanted:
                return row
        raise KeyError(wanted)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Truth:
    """What an estimator is held against: ∇J [prefixes, vocabulary] and its norm."""

    gradient: Tensor
    norm: float

    def cosine(self, estimates: Tensor) -> float:
        """Mean cosine to ∇J of [..., prefixes, vocabulary]; an estimate of zero counts 0."""
        flat = estimates.reshape(-1, self.gradient.numel())
        length = flat.square().sum(-1).sqrt() * self.norm
        return float((flat @ self.gradient.flatten() / length.clamp(min=1e-30)).mean())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batches:
    """`count` batches of `size` responses sampled from μ, concatenated."""

    count: int
    size: int
    positions: Tensor  # [tokens] into the tree
    index: Tensor  # [tokens] which of the count·size responses
    bounds: Tensor  # [count + 1] first token of each batch


Key = tuple[str, str, int, int]


def allowed(objective: str, correction: str) -> bool:
    return not (objective in SEQUENCE_OBJECTIVES and correction in ("mask_token", "m2"))


def run_study(settings: StudySettings, progress: Callable[[float], None] | None = None) -> StudyResult:
    """Measure every estimator on every task; `progress` is told the share done."""
    measured: dict[Key, list[dict[str, float]]] = {}
    distances: dict[int, list[dict[str, float]]] = {}
    for task in range(settings.tasks):
        for number, (staleness, situation) in enumerate(_situations(settings, task)):
            distances.setdefault(staleness, []).append(_distance(situation))
            for key, row in _measure(settings, staleness, situation, task):
                measured.setdefault(key, []).append(row)
            if progress is not None:
                progress((task + (number + 1) / len(settings.staleness)) / settings.tasks)
    rows = tuple(
        StudyRow(
            objective=objective,
            correction=correction,
            staleness=k,
            samples=n,
            enumerated=correction != "m2",
            measures=_averaged(measured[objective, correction, k, n], MEASURES),
        )
        for objective, correction in settings.estimators
        for k in settings.staleness
        for n in settings.samples
    )
    distance = {k: _averaged(found, DISTANCES) for k, found in distances.items()}
    return StudyResult(settings=settings, rows=rows, distance=distance)


def _situations(settings: StudySettings, task: int) -> Iterator[tuple[int, Situation]]:
    """(k, situation) with the data of k steps ago, of one learner on one task.

    The baseline is E_μ r, what the mean of a large group gives.
    """
    tree = make_tree(settings.vocabulary, settings.length, ends=settings.ends)
    generator = seeded(settings.seed, task)
    rewards = random_rewards(tree, generator)
    steps = max(settings.staleness) + settings.inner_steps
    start = random_policy(tree, generator)
    if settings.drift == "aimless":
        passed = aimless_steps(tree, start, steps, generator, settings.learning_rate)
    else:
        passed = learner_steps(tree, start, rewards, steps, generator, learning_rate=settings.learning_rate)
    for k in settings.staleness:
        now = len(passed) - 1 - settings.inner_steps
        behavior = passed[now - k]
        baseline = exact.expected_reward(tree, behavior, rewards)
        yield (
            k,
            Situation(
                tree=tree,
                behavior=behavior,
                start=passed[now],
                policy=passed[-1],
                rewards=rewards,
                baseline=float(baseline),
            ),
        )


def _distance(situation: Situation) -> dict[str, float]:
    tree, policy, behavior = situation.tree, situation.policy, situation.behavior
    found = (
        exact.sequence_kl(tree, policy, behavior),
        exact.sequence_chi2(tree, policy, behavior),
        exact.mean_token_chi2(tree, policy, behavior),
    )
    return {name: float(value) if value > 1e-12 else 0.0 for name, value in zip(DISTANCES, found, strict=True)}


def _measure(
    settings: StudySettings, staleness: int, situation: Situation, task: int
) -> Iterator[tuple[Key, dict[str, float]]]:
    """Every estimator in one situation, with every number of responses."""
    gradient = exact.reward_gradient(situation.tree, situation.policy, situation.rewards)
    truth = Truth(gradient=gradient, norm=float(gradient.norm()))
    drawn = [_draw(situation, settings.batches, n, seeded(settings.seed, task, staleness, n)) for n in settings.samples]
    masks = [_mask_by_batch(situation, batches) for batches in drawn] if "m2" in settings.corrections else []
    for objective, correction in settings.estimators:
        if correction == "m2":
            for batches, mask in zip(drawn, masks, strict=True):
                tokens = situation.batch(objective, batches.positions, batches.index, batches.count * batches.size)
                c = coefficients(tokens, objective, mask, responses=batches.size)
                measures = _sampled_measures(truth, _gradients(situation, batches, c))
                yield (objective, correction, staleness, batches.size), measures
        else:
            c = response_coefficients(situation, objective, correction)
            one = moments(situation.tree, situation.behavior, situation.policy, c)
            for batches in drawn:
                gradients = _gradients(situation, batches, c[batches.positions] / batches.size)
                measures = _enumerated_measures(truth, one, batches.size) | {"batch_cosine": truth.cosine(gradients)}
                yield (objective, correction, staleness, batches.size), measures


def _enumerated_measures(truth: Truth, one: Moments, samples: int) -> dict[str, float]:
    bias = float((one.mean - truth.gradient).norm()) / truth.norm
    variance = one.variance / samples / truth.norm**2
    return {"bias": bias, "variance": variance, "mse": bias**2 + variance, "cosine": truth.cosine(one.mean)}


def _sampled_measures(truth: Truth, gradients: Tensor) -> dict[str, float]:
    """The same from estimates [batches, prefixes, vocabulary].

    The mean of K estimates carries noise of variance V/K: it is taken from the squares of bias and length.
    """
    count, centre = len(gradients), gradients.mean(0)
    variance = float((gradients - centre).square().sum()) / (count - 1)
    bias = max(float((centre - truth.gradient).square().sum()) - variance / count, 0.0) ** 0.5
    length = max(float(centre.square().sum()) - variance / count, 0.0) ** 0.5
    along = float((centre * truth.gradient).sum()) / truth.norm
    return {
        "bias": bias / truth.norm,
        "variance": variance / truth.norm**2,
        "mse": float((gradients - truth.gradient).square().sum()) / count / truth.norm**2,
        "cosine": max(-1.0, min(1.0, along / length)) if length else 0.0,
        "batch_cosine": truth.cosine(gradients),
    }


def _draw(situation: Situation, count: int, size: int, generator: torch.Generator) -> Batches:
    drawn = sample(situation.tree, situation.behavior, count * size, generator)
    positions, index = situation.tree.tokens_of(drawn)
    bounds = torch.searchsorted(index // size, torch.arange(count + 1))
    return Batches(count=count, size=size, positions=positions, index=index, bounds=bounds)


def _mask_by_batch(situation: Situation, batches: Batches) -> Correction:
    """`m2` of each batch by itself, as one correction of all their tokens; it is the same for every objective."""
    tokens = situation.batch("reinforce", batches.positions, batches.index, batches.count * batches.size)
    parts = []
    for number in range(batches.count):
        own = slice(int(batches.bounds[number]), int(batches.bounds[number + 1]))
        parts.append(
            compute_correction(
                "m2",
                step_start_logprobs=tokens.step_start_logprobs[own],
                behavior_logprobs=tokens.behavior_logprobs[own],
                loss_mask=tokens.loss_mask[own],
                response_index=batches.index[own] - number * batches.size,
                responses=batches.size,
                objective="reinforce",
            )
        )
    return replace(
        parts[0],
        weight=torch.cat([part.weight for part in parts]),
        keep=torch.cat([part.keep for part in parts]),
        truncated=torch.cat([part.truncated for part in parts]),
    )


def _gradients(situation: Situation, batches: Batches, c: Tensor) -> Tensor:
    return batch_gradients(
        situation.tree, situation.policy, batches.positions, batches.index // batches.size, batches.count, c
    )


def _averaged(found: Sequence[dict[str, float]], names: Sequence[str]) -> dict[str, Estimate]:
    return {name: mean([one[name] for one in found]) for name in names}
