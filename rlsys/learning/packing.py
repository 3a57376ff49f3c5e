"""Ragged prompts and responses into dense rows without computing any prefix twice.

    group:  prompt p, responses a b c | a b d | e        (the last token predicts nothing: not fed)

    trie, depth first:   p ── a ── b          one row:   p  a  b
                         └── (e: no input)    column:    0  1  2

A *tree* is the trie of some responses to one prompt, or to several that begin alike, as under one instruction; a row
holds whole trees. In depth-first order the descendants of column j are the contiguous columns j+1 .. end_j - 1, so one
integer per column says everything about attention: query i sees key j if and only if j <= i < end_j. Log-probabilities
depend only on the prefix, so sharing prefixes changes no result, only the work: eight short samples of one prompt cost
little more than one, and a hundred prompts under one instruction compute it once a row.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlsys.records import IntArray

Int64Array = npt.NDArray[np.int64]

TRIES = 12
"""Numbers of rows compared for every batch."""

WORTH = 16
"""Tokens that prompts must have in common to be packed as one: fewer save less than larger pieces cost in padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """G responses and the prompts they answer; the flat token order everywhere is response by response.

    `prompts` has one entry per prompt, `prompt_of` [G] names each response's prompt.
    """

    prompts: Sequence[Sequence[int]]
    responses: Sequence[IntArray]
    prompt_of: Sequence[int]

    def offsets(self) -> Int64Array:
        """Where each response starts in the flat order, [G + 1]."""
        lengths = np.fromiter((len(r) for r in self.responses), dtype=np.int64, count=len(self.responses))
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One micro-batch: R rows of L columns, and where the N response tokens' predictions are.

    `input_ids`, `position_ids`, `subtree_end` [R, L] int64. Token k of this micro-batch has id `token_ids[k]`,
    is predicted at the flat place `predictors[k]` = row·L + column, and is token `token_index[k]` of the batch's
    flat order. `responses` names the batch's responses in it, ascending, and `response_index` [N] counts within
    those. A response is never divided.
    """

    input_ids: Tensor
    position_ids: Tensor
    subtree_end: Tensor
    predictors: Tensor
    token_ids: Tensor
    response_index: Tensor
    token_index: Tensor
    responses: Int64Array
    filled: int

    def mask(self) -> Tensor:
        """Who attends to whom, [R, 1, L, L] bool; padding attends to itself only."""
        column = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        query, key = column[None, :, None], column[None, None, :]
        return ((key <= query) & (query < self.subtree_end[:, None, :])).unsqueeze(1)

    def to(self, device: torch.device) -> "Packed":
        """The same micro-batch with its tensors on `device`."""
        if self.input_ids.device == device:
            return self
        moved = {n: getattr(self, n).to(device) for n in _TENSORS}
        return Packed(**moved, responses=self.responses, filled=self.filled)


_TENSORS = ("input_ids", "position_ids", "subtree_end", "predictors", "token_ids", "response_index", "token_index")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """The micro-batches of a batch, or of one rank's share of it, and what packing saved.

    Of the whole batch are: `passes`, the number of micro-batches; `fed_tokens`, columns that hold a token;
    `padded_tokens`, all columns; `sequence_tokens`, prompt plus response tokens as if every response were fed alone.
    """

    micro_batches: tuple[Packed, ...]
    passes: int
    fed_tokens: int
    padded_tokens: int
    sequence_tokens: int

    @property
    def fill(self) -> float:
        """Share of columns that hold a token."""
        return self.fed_tokens / self.padded_tokens if self.padded_tokens else 1.0

    @property
    def sharing(self) -> float:
        """Tokens standing in the batch for every token computed."""
        return self.sequence_tokens / self.fed_tokens if self.fed_tokens else 1.0


@dataclass(frozen=True, slots=True)
class _Tree:
    """Columns of one tree, and for its responses in turn the column that predicts each token."""

    ids: Int64Array
    depth: Int64Array
    end: Int64Array
    responses: tuple[int, ...]
    predictors: tuple[Int64Array, ...]


def pack(
    sequences: Sequences,
    *,
    row_tokens: int,
    micro_batch_tokens: int,
    members: Iterable[int] | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Packing:
    """Pack the responses `members` (None: all) into rows, and rows into micro-batches.

    Rows have at most max(row_tokens, longest tree) columns. Empty responses take part in nothing. Of several `ranks`
    each gets as many rows, which are equally long, in as many micro-batches; a row may be empty. Raises
    ValueError for an empty prompt (nothing predicts the first token).
    """
    chosen = range(len(sequences.responses)) if members is None else [int(m) for m in members]
    trees = [tree for family in _families(sequences, chosen) for tree in _trees(family, row_tokens)]
    rows, width = _rows(trees, row_tokens, ranks)
    offsets = sequences.offsets()
    share = len(rows) // ranks
    passes = -(-share // max(1, micro_batch_tokens // width))
    edges = [rank * share + i * share // max(passes, 1) for i in range(passes + 1)]
    return Packing(
        micro_batches=tuple(_materialise(rows[a:b], width, sequences, offsets) for a, b in pairwise(edges)),
        passes=passes * ranks,
        fed_tokens=sum(len(tree.ids) for tree in trees),
        padded_tokens=len(rows) * width,
        sequence_tokens=sum(
            len(sequences.prompts[sequences.prompt_of[i]]) + len(sequences.responses[i]) for i in chosen
        ),
    )


@dataclass(frozen=True, slots=True)
class _Fed:
    """A response's input, its prompt and all but its own last token, and the column that predicts its first one."""

    response: int
    ids: Int64Array
    first: int


def _families(sequences: Sequences, chosen: Iterable[int]) -> list[list[_Fed]]:
    """Chosen responses of each prompt, and of prompts that begin with the same `WORTH` tokens and mostly alike.

    A family is sorted by its tokens, so that shared prefixes are neighbours.
    """
    prompts: dict[int, list[int]] = {}
    for response in chosen:
        prompt = sequences.prompt_of[response]
        if not len(sequences.prompts[prompt]):
            raise ValueError(f"prompt {prompt} is empty: nothing predicts the first response token")
        if len(sequences.responses[response]):
            prompts.setdefault(prompt, []).append(response)
    families: list[list[_Fed]] = []
    last: Int64Array = np.empty(0, dtype=np.int64)
    for prompt in sorted(prompts, key=lambda p: (list(sequences.prompts[p]), p)):
        ids = np.asarray(sequences.prompts[prompt], dtype=np.int64)
        if _common_prefix(last, ids) < max(WORTH, min(len(last), len(ids)) // 2):
            families.append([])
        last = ids
        families[-1] += [
            _Fed(response, np.concatenate([ids, sequences.responses[response][:-1]]), len(ids) - 1)
            for response in prompts[prompt]
        ]
    families.sort(key=lambda family: min(fed.response for fed in family))
    for family in families:
        family.sort(key=lambda fed: fed.ids.tolist())
    return families


def _trees(family: Sequence[_Fed], capacity: int) -> list[_Tree]:
    """Tries over runs of a family, cut where a tree would outgrow `capacity` columns."""
    trees: list[_Tree] = []
    run: list[tuple[_Fed, int]] = []
    size = 0
    for fed in family:
        shared = _common_prefix(run[-1][0].ids, fed.ids) if run else 0
        if run and size + len(fed.ids) - shared > capacity:
            trees.append(_tree(run))
            run, size, shared = [], 0, 0
        run.append((fed, shared))
        size += len(fed.ids) - shared
    trees.append(_tree(run))
    return trees


def _tree(run: Sequence[tuple[_Fed, int]]) -> _Tree:
    """The trie in depth-first order of `run`: sorted inputs, each with the tokens it shares with the one before.

    `path` holds the columns from the root to the current leaf; a column's subtree ends where the next
    input leaves the path above it.
    """
    ids, depths, ends = np.zeros((3, sum(len(fed.ids) - shared for fed, shared in run)), dtype=np.int64)
    columns = 0
    path: Int64Array = np.empty(0, dtype=np.int64)
    predictors = []
    for fed, shared in run:
        stop = columns + len(fed.ids) - shared
        ends[path[shared:]] = columns
        path = np.concatenate([path[:shared], np.arange(columns, stop)])
        ids[columns:stop] = fed.ids[shared:]
        depths[columns:stop] = np.arange(shared, len(fed.ids))
        columns = stop
        predictors.append(path[fed.first :])
    ends[path] = columns
    return _Tree(ids, depths, ends, tuple(fed.response for fed, _ in run), tuple(predictors))


def _common_prefix(left: Int64Array, right: Int64Array) -> int:
    shorter = min(len(left), len(right))
    if not shorter:
        return 0
    differs = left[:shorter] != right[:shorter]
    first = int(differs.argmax())
    return first if differs[first] else shorter


def _rows(trees: list[_Tree], row_tokens: int, ranks: int) -> tuple[list[list[_Tree]], int]:
    """Rows, a multiple of `ranks`, and their common width, at most max(row_tokens, longest tree), with little padding.

    For a given number of rows the longest tree left goes to the emptiest row (Graham's rule), which evens them
    out; of the first few numbers of rows that keep to the width the one with the least padding is taken.
    """
    sizes = [len(t.ids) for t in trees]
    limit = max([row_tokens, *sizes])
    most = _up(len(trees), ranks)
    count = _up(-(-sum(sizes) // limit), ranks)
    fitting: list[tuple[int, list[list[_Tree]], int]] = []
    while trees and len(fitting) < TRIES:
        rows, width = _even_rows(trees, count)
        if width <= limit:
            fitting.append((count * width, rows, width))
        if count >= most:
            break
        count = min(_up(max(count + 1, count * 51 // 50), ranks), most)
    _, rows, width = min(fitting, key=lambda found: found[0], default=(0, [], 1))
    return rows, width


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _even_rows(trees: list[_Tree], count: int) -> tuple[list[list[_Tree]], int]:
    """`trees` on `count` rows, longest first, each to the emptiest row; and the fullest row's width."""
    rows: list[list[_Tree]] = [[] for _ in range(count)]
    loads = [(0, row) for row in range(count)]
    for tree in sorted(trees, key=lambda t: -len(t.ids)):
        load, row = loads[0]
        rows[row].append(tree)
        heapq.heapreplace(loads, (load + len(tree.ids), row))
    return rows, max(load for load, _ in loads)


def _materialise(rows: list[list[_Tree]], width: int, sequences: Sequences, offsets: Int64Array) -> Packed:
    """Dense tensors of some rows; tokens ordered by response, as in the batch."""
    ids = np.zeros((len(rows), width), dtype=np.int64)
    depth = np.zeros((len(rows), width), dtype=np.int64)
    end = np.broadcast_to(np.arange(1, width + 1), ids.shape).copy()
    predictors: dict[int, Int64Array] = {}
    filled = 0
    for r, row in enumerate(rows):
        start = 0
        for tree in row:
            stop = start + len(tree.ids)
            ids[r, start:stop], depth[r, start:stop], end[r, start:stop] = tree.ids, tree.depth, tree.end + start
            for response, columns in zip(tree.responses, tree.predictors, strict=True):
                predictors[response] = columns + (r * width + start)
            start = stop
        filled += start
    order = sorted(predictors)
    lengths = np.asarray([len(predictors[i]) for i in order], dtype=np.int64)
    return Packed(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(depth),
        subtree_end=torch.from_numpy(end),
        predictors=_flat([predictors[i] for i in order]),
        token_ids=_flat([sequences.responses[i] for i in order]),
        response_index=torch.from_numpy(np.repeat(np.arange(len(order)), lengths)),
        responses=np.asarray(order, dtype=np.int64),
        token_index=_flat([np.arange(offsets[i], offsets[i + 1]) for i in order]),
        filled=filled,
    )


def _flat(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *parts]))
