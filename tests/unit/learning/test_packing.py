"""Packing changes the work, never the prefix a token is predicted from."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.learning.packing import Packed, Sequences, pack

token = st.integers(0, 3)
groups = st.lists(
    st.tuples(st.lists(token, min_size=1, max_size=6), st.lists(st.lists(token, max_size=7), min_size=1, max_size=6)),
    min_size=1,
    max_size=6,
)


def sequences_of(drawn: list[tuple[list[int], list[list[int]]]]) -> Sequences:
    return Sequences(
        prompts=[prompt for prompt, _ in drawn],
        responses=[np.asarray(r, dtype=np.int32) for _, responses in drawn for r in responses],
        prompt_of=[i for i, (_, responses) in enumerate(drawn) for _ in responses],
    )


def visible_prefix(micro: Packed, place: int) -> tuple[list[int], list[int]]:
    """Tokens and positions that the column at the flat `place` attends to, in order of columns."""
    row, column = divmod(place, micro.input_ids.shape[1])
    seen = micro.mask()[row, 0, column]
    return micro.input_ids[row, seen].tolist(), micro.position_ids[row, seen].tolist()


@settings(max_examples=60, deadline=None)
@given(drawn=groups, row_tokens=st.integers(1, 24), micro_batch_tokens=st.integers(1, 80))
def test_every_token_is_predicted_from_exactly_its_own_prefix(drawn, row_tokens, micro_batch_tokens):
    require_own_prefixes(sequences_of(drawn), row_tokens, micro_batch_tokens)


def require_own_prefixes(sequences: Sequences, row_tokens: int, micro_batch_tokens: int) -> None:
    offsets = sequences.offsets()
    packing = pack(sequences, row_tokens=row_tokens, micro_batch_tokens=micro_batch_tokens)
    seen: list[int] = []
    for micro in packing.micro_batches:
        for k, place in enumerate(micro.predictors.tolist()):
            response = int(micro.responses[micro.response_index[k]])
            t = int(micro.token_index[k]) - int(offsets[response])
            tokens, positions = visible_prefix(micro, place)
            answer = sequences.responses[response].tolist()
            assert tokens == [*sequences.prompts[sequences.prompt_of[response]], *answer[:t]]
            assert positions == list(range(len(tokens)))
            assert int(micro.token_ids[k]) == answer[t]
        seen += micro.token_index.tolist()
    assert sorted(seen) == list(range(offsets[-1])), "every token once"


@settings(max_examples=60, deadline=None)
@given(drawn=groups, row_tokens=st.integers(1, 24), micro_batch_tokens=st.integers(1, 80))
def test_a_response_is_never_divided_and_a_micro_batch_keeps_its_limit(drawn, row_tokens, micro_batch_tokens):
    packing = pack(sequences_of(drawn), row_tokens=row_tokens, micro_batch_tokens=micro_batch_tokens)
    responses = [int(i) for micro in packing.micro_batches for i in micro.responses]
    assert len(responses) == len(set(responses))
    for micro in packing.micro_batches:
        assert micro.responses.tolist() == sorted(micro.responses.tolist())
        assert (micro.response_index.diff() >= 0).all(), "tokens of a response are contiguous"
        assert micro.input_ids.numel() <= micro_batch_tokens or len(micro.input_ids) == 1
        assert micro.input_ids.shape[1] <= max(row_tokens, 13)


@settings(max_examples=30, deadline=None)
@given(drawn=groups)
def test_no_column_attends_to_another_tree_and_padding_only_to_itself(drawn):
    packing = pack(sequences_of(drawn), row_tokens=20, micro_batch_tokens=60)
    for micro in packing.micro_batches:
        mask = micro.mask()[:, 0]
        assert mask.diagonal(dim1=1, dim2=2).all(), "a row without a key would be NaN"
        assert not mask.triu(1).any(), "causal"
        filled = sum(len(set(np.flatnonzero(mask[r].any(0)))) for r in range(len(mask)))
        assert filled == micro.input_ids.numel()
        empty = (mask.sum(-1) == 1) & (micro.position_ids == 0)
        assert int(empty.sum()) >= micro.input_ids.numel() - micro.filled


def test_quickstart_lengths_fill_the_rows():
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 12, int(n)).tolist() for n in random.choice([4, 5, 6], 64, p=[0.05, 0.25, 0.7])]
    answers = [np.append(random.integers(0, 10, int(n)), 12).astype(np.int32) for n in random.choice([2, 3], 512)]
    sequences = Sequences(prompts=prompts, responses=answers, prompt_of=np.repeat(np.arange(64), 8).tolist())
    packing = pack(sequences, row_tokens=64, micro_batch_tokens=8192)
    assert packing.fill >= 0.95
    assert packing.sharing >= 2.5, "prompts and first digits are computed once"


def instructed(prompts: int, instruction: int = 20) -> Sequences:
    """One response of two tokens to each prompt; prompts end in one token of their own."""
    return Sequences(
        prompts=[[*range(100, 100 + instruction), i] for i in range(prompts)],
        responses=[np.asarray([7, 1], dtype=np.int32)] * prompts,
        prompt_of=range(prompts),
    )


def test_an_instruction_that_prompts_share_is_computed_once_a_row():
    one_row = pack(instructed(5), row_tokens=30, micro_batch_tokens=64)
    assert one_row.fed_tokens == 20 + 5 * 2
    two_rows = pack(instructed(6), row_tokens=30, micro_batch_tokens=64)
    assert two_rows.fed_tokens == 2 * 20 + 6 * 2
    assert two_rows.sharing == 6 * 23 / 52


def test_prompts_with_little_in_common_are_packed_each_for_itself():
    short = pack(instructed(4, instruction=15), row_tokens=64, micro_batch_tokens=64)
    assert short.fed_tokens == 4 * (15 + 2)


@settings(max_examples=60, deadline=None)
@given(drawn=groups, row_tokens=st.integers(20, 60), instruction=st.integers(16, 20))
def test_tokens_under_a_shared_instruction_are_predicted_from_exactly_their_own_prefix(drawn, row_tokens, instruction):
    drawn = [([9] * instruction + prompt, responses) for prompt, responses in drawn]
    require_own_prefixes(sequences_of(drawn), row_tokens, 80)


def test_equal_responses_cost_one():
    answer = np.asarray([5, 6, 7, 1], dtype=np.int32)
    once = pack(Sequences(prompts=[[2, 3]], responses=[answer], prompt_of=[0]), row_tokens=8, micro_batch_tokens=64)
    eight = pack(
        Sequences(prompts=[[2, 3]], responses=[answer] * 8, prompt_of=[0] * 8), row_tokens=8, micro_batch_tokens=64
    )
    assert once.fed_tokens == eight.fed_tokens == 2 + 3, "the last token predicts nothing and is not fed"
    assert eight.sharing == 8 * 6 / 5


def test_a_group_larger_than_a_row_is_cut_between_responses():
    answers = [np.asarray([i, i, i, i, 1], dtype=np.int32) for i in range(2, 8)]
    sequences = Sequences(prompts=[[9, 9, 9]], responses=answers, prompt_of=[0] * 6)
    packing = pack(sequences, row_tokens=12, micro_batch_tokens=12)
    assert [len(m.responses) for m in packing.micro_batches] == [2, 2, 2]
    assert packing.fed_tokens == 3 * (3 + 2 * 4)


def test_a_subset_of_responses_keeps_their_places_in_the_batch():
    answers = [np.asarray([i, 1], dtype=np.int32) for i in range(2, 6)]
    sequences = Sequences(prompts=[[9], [8]], responses=answers, prompt_of=[0, 0, 1, 1])
    packing = pack(sequences, row_tokens=8, micro_batch_tokens=8, members=[1, 2])
    (micro,) = packing.micro_batches
    assert micro.responses.tolist() == [1, 2]
    assert micro.token_index.tolist() == [2, 3, 4, 5]
    assert torch.equal(micro.token_ids, torch.tensor([3, 1, 4, 1]))


def test_empty_responses_take_no_part_and_an_empty_prompt_is_refused():
    nothing = np.empty(0, dtype=np.int32)
    packing = pack(Sequences(prompts=[[4]], responses=[nothing], prompt_of=[0]), row_tokens=8, micro_batch_tokens=8)
    assert packing.micro_batches == ()
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        pack(
            Sequences(prompts=[[]], responses=[np.asarray([1], dtype=np.int32)], prompt_of=[0]),
            row_tokens=8,
            micro_batch_tokens=8,
        )


@settings(max_examples=60, deadline=None)
@given(groups, st.integers(2, 4), st.integers(1, 64))
def test_ranks_share_the_rows_evenly_and_lose_no_token(drawn, ranks: int, micro_batch_tokens: int) -> None:
    sequences = sequences_of(drawn)
    shares = [
        pack(sequences, row_tokens=8, micro_batch_tokens=micro_batch_tokens, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    micros = [micro for share in shares for micro in share.micro_batches]
    assert sorted(k for micro in micros for k in micro.token_index.tolist()) == list(range(sequences.offsets()[-1]))
    assert len({len(share.micro_batches) for share in shares}) == 1, "collectives need as many passes everywhere"
    assert len({sum(len(micro.input_ids) for micro in share.micro_batches) for share in shares}) == 1
    for share in shares:
        assert share.passes == len(micros)
        assert share.fed_tokens == sum(micro.filled for micro in micros)
        assert share.padded_tokens == sum(micro.input_ids.numel() for micro in micros)


def test_a_rank_without_a_tree_gets_an_empty_row() -> None:
    sequences = sequences_of([([1, 2], [[3, 4]])])
    first, second = (pack(sequences, row_tokens=8, micro_batch_tokens=64, rank=r, ranks=2) for r in range(2))
    (full,), (empty,) = first.micro_batches, second.micro_batches
    assert (full.filled, empty.filled, len(empty.token_ids)) == (3, 0, 0)
    assert empty.input_ids.shape == full.input_ids.shape
