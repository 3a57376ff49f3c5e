"""Ragged prompts and responses into dense rows without computing any prefix twice.

    group:  prompt p, responses a b c | a b d | e        (the last token predicts nothing: not fed)

    trie, depth first:   p ── a ── b          one row:   p  a  b
                         └── (e: no input)    column:    0  1  2

A *tree* is the trie of some responses to one prompt; a row holds whole trees. In depth-first order the
descendants of column j are the contiguous columns j+1 .. end_j - 1, so one integer per column says everything
about attention: query i sees key j if and only if j <= i < end_j. Log-probabilities depend only on the prefix,
so sharing prefixes changes no result, only the work: eight short samples of one prompt cost little more than one.
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
    trees = [tree for group in _by_prompt(sequences, chosen) for tree in _trees(sequences, group, row_tokens)]
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


def _by_prompt(sequences: Sequences, chosen: Iterable[int]) -> list[list[int]]:
    """Chosen responses of each prompt, sorted by their tokens so that shared prefixes are neighbours."""
    groups: dict[int, list[int]] = {}
    for response in chosen:
        prompt = sequences.prompt_of[response]
        if not len(sequences.prompts[prompt]):
            raise ValueError(f"prompt {prompt} is empty: nothing predicts the first response token")
        if len(sequences.responses[response]):
            groups.setdefault(prompt, []).append(response)
    for group in groups.values():
        group.sort(key=lambda response: sequences.responses[response].tolist())
    return list(groups.values())


def _trees(sequences: Sequences, group: list[int], capacity: int) -> list[_Tree]:
    """Tries over runs of one prompt's sorted responses, cut where a tree would outgrow `capacity` columns."""
    trees: list[_Tree] = []
    prompt = np.asarray(sequences.prompts[sequences.prompt_of[group[0]]], dtype=np.int64)
    run: list[tuple[int, int]] = []
    size = len(prompt)
    fed: IntArray = np.empty(0, dtype=np.int32)
    for response in group:
        previous, fed = fed, sequences.responses[response][:-1]
        shared = _common_prefix(previous, fed)
        if run and size + len(fed) - shared > capacity:
            trees.append(_tree(sequences, prompt, run))
            run, size, shared = [], len(prompt), 0
        run.append((response, shared))
        size += len(fed) - shared
    trees.append(_tree(sequences, prompt, run))
    return trees


def _tree(sequences: Sequences, prompt: Int64Array, run: list[tuple[int, int]]) -> _Tree:
    """The trie in depth-first order of `run`: sorted responses, each with the tokens it shares with the one before.

    `path` holds the columns from the root to the current leaf; a column's subtree ends where the next
    response leaves the path above it.
    """
    most = len(prompt) + sum(len(sequences.responses[response]) for response, _ in run)
    ids, depths, ends = np.zeros((3, most), dtype=np.int64)
    columns = len(prompt)
    ids[:columns], depths[:columns] = prompt, np.arange(columns)
    path = np.arange(columns)
    predictors = []
    for response, shared in run:
        fed = sequences.responses[response][:-1]
        depth, new = len(prompt) + shared, len(fed) - shared
        ends[path[depth:]] = columns
        path = np.concatenate([path[:depth], np.arange(columns, columns + new)])
        ids[columns : columns + new] = fed[shared:]
        depths[columns : columns + new] = np.arange(depth, depth + new)
        columns += new
        predictors.append(path[len(prompt) - 1 :])
    ends[path] = columns
    responses = tuple(response for response, _ in run)
    return _Tree(ids[:columns], depths[:columns], ends[:columns], responses, tuple(predictors))


def _common_prefix(left: IntArray, right: IntArray) -> int:
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
