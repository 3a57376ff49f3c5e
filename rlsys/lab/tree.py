"""A policy small enough to enumerate: every response it can give, and the probability of each.

A *policy* is a table of logits, [prefixes, vocabulary] float64: one softmax row per prefix, nothing shared.
That makes every expectation a finite sum and every gradient exact, while sampling, weights and losses are
those of a language model. 6 tokens of 6 symbols are 46 656 responses and take a fraction of a second.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.algo.importance import segment_sum
from rlsys.errors import ConfigError

LARGEST_VOCABULARY = 6
LARGEST_HORIZON = 6
END = 0
"""The token that ends a response early, in a tree with `ends`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tree:
    """All responses of at most `horizon` tokens, their N tokens concatenated in the layout of `TokenBatch`.

    token_ids, prefix_ids, response_index: [N] int64; prefix_ids names the row of the policy that the token was
    drawn from. lengths: [responses]. depths: [prefixes], how many tokens each prefix has; row 0 is the empty one.
    A prefix occurs at most once in a response.
    """

    vocabulary: int
    horizon: int
    ends: bool
    token_ids: Tensor
    prefix_ids: Tensor
    response_index: Tensor
    lengths: Tensor
    depths: Tensor

    @property
    def responses(self) -> int:
        return len(self.lengths)

    @property
    def prefixes(self) -> int:
        return len(self.depths)

    @property
    def cells(self) -> Tensor:
        """Each token's place in the flattened policy table, [N]."""
        return self.prefix_ids * self.vocabulary + self.token_ids

    def logprobs(self, policy: Tensor, positions: Tensor | None = None) -> Tensor:
        """log π(y_t | s_t) of every token of every response, [N], or of those at `positions`; with gradient."""
        cells = self.cells if positions is None else self.cells[positions]
        return policy.log_softmax(-1).flatten()[cells]

    def log_probabilities(self, policy: Tensor) -> Tensor:
        """log π(y) = Σ_t log π(y_t | s_t), [responses]."""
        return segment_sum(self.logprobs(policy), self.response_index, self.responses)

    def probabilities(self, policy: Tensor) -> Tensor:
        """π(y), [responses]; sums to 1."""
        return self.log_probabilities(policy).exp()

    def tokens_of(self, responses: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of a batch of responses (repetitions allowed), [n] -> positions in the tree, and which
        element of the batch each belongs to: both [tokens of the batch]."""
        lengths = self.lengths[responses]
        first = (self.lengths.cumsum(0) - self.lengths)[responses]
        index = torch.repeat_interleave(torch.arange(len(responses)), lengths)
        step = torch.arange(len(index)) - (lengths.cumsum(0) - lengths)[index]
        return first[index] + step, index


def make_tree(vocabulary: int, horizon: int, *, ends: bool = False) -> Tree:
    """Grow all prefixes one token at a time; with `ends`, token 0 ends a response.

    >>> make_tree(2, 2, ends=True).token_ids  # responses (0), (1 0), (1 1)
    tensor([0, 1, 0, 1, 1])
    """
    if not (2 <= vocabulary <= LARGEST_VOCABULARY and 1 <= horizon <= LARGEST_HORIZON):
        raise ConfigError(
            f"lab: vocabulary={vocabulary} length={horizon} cannot be enumerated; allowed are "
            f"vocabulary 2 to {LARGEST_VOCABULARY} and length 1 to {LARGEST_HORIZON}"
        )
    tokens = torch.empty(1, 0, dtype=torch.int64)  # [alive prefixes, depth], and the rows met on the way there
    rows = torch.zeros(1, 1, dtype=torch.int64)
    finished: list[tuple[Tensor, Tensor]] = []
    depths = [0]
    for depth in range(1, horizon + 1):
        symbols = torch.arange(vocabulary).repeat(len(tokens))[:, None]
        tokens = torch.cat([tokens.repeat_interleave(vocabulary, 0), symbols], 1)
        rows = rows.repeat_interleave(vocabulary, 0)
        done = torch.full((len(tokens),), depth == horizon)
        if ends:
            done |= tokens[:, -1] == END
        finished.append((tokens[done], rows[done]))
        tokens = tokens[~done]
        rows = torch.cat([rows[~done], len(depths) + torch.arange(len(tokens))[:, None]], 1)
        depths += [depth] * len(tokens)
    lengths = torch.cat([torch.full((len(block),), block.shape[1]) for block, _ in finished])
    return Tree(
        vocabulary=vocabulary,
        horizon=horizon,
        ends=ends,
        token_ids=torch.cat([block.flatten() for block, _ in finished]),
        prefix_ids=torch.cat([block.flatten() for _, block in finished]),
        response_index=torch.repeat_interleave(torch.arange(len(lengths)), lengths),
        lengths=lengths,
        depths=torch.tensor(depths),
    )


def random_policy(tree: Tree, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """A policy with independent normal logits, or a direction to move one in. [prefixes, vocabulary]."""
    return scale * torch.randn(tree.prefixes, tree.vocabulary, generator=generator, dtype=torch.float64)


def by_position(tree: Tree, rows: Tensor) -> Tensor:
    """The policy whose choice depends on the position alone. rows: [horizon, vocabulary] logits."""
    return rows[tree.depths]


def random_rewards(tree: Tree, generator: torch.Generator, pass_rate: float = 0.25) -> Tensor:
    """A verifiable reward: 1 for the share `pass_rate` of responses with the best hidden score, else 0. [responses].

    The score adds a random number per (position, token) and per pair of neighbours, as an answer's quality is
    neither one token's doing nor noise.
    """
    v, t = tree.vocabulary, tree.horizon
    single, pair = (torch.randn(t, n, generator=generator, dtype=torch.float64) for n in (v, v * v))
    position = tree.depths[tree.prefix_ids]
    before = torch.where(position > 0, tree.token_ids.roll(1), 0)
    gain = single[position, tree.token_ids] + pair[position, before * v + tree.token_ids]
    score = segment_sum(gain, tree.response_index, tree.responses)
    accepted = max(1, round(pass_rate * tree.responses))
    rewards = torch.zeros(tree.responses, dtype=torch.float64)
    rewards[score.topk(accepted).indices] = 1.0
    return rewards


def sample(tree: Tree, policy: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n responses drawn from the policy, [n] int64 indices into the tree."""
    return torch.multinomial(tree.probabilities(policy), n, replacement=True, generator=generator)


def seeded(*numbers: int) -> torch.Generator:
    """A generator for one purpose: different numbers give unrelated streams."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(seed)
