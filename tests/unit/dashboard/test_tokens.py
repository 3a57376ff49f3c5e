"""Tokens are shown with the text that is theirs, or as ids: never with another token's text."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models

from rlsys.dashboard.tokens import Decoder, response, responses, token_texts
from tests.made_run import make_run

NONE = Decoder(Path("/nowhere"))


def decoder(tmp_path: Path, **vocabulary: int) -> Decoder:
    """Of a run whose newest checkpoint has this vocabulary."""
    for step in (1, 2):
        checkpoint = tmp_path / f"step-{step:06d}"
        checkpoint.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    return Decoder(tmp_path)


def test_characters_stand_for_tokens_when_there_is_one_for_each() -> None:
    assert token_texts([5, 6, 5], "aba", NONE) == (["a", "b", "a"], "text")


def test_an_end_token_that_leaves_no_text_is_marked() -> None:
    assert token_texts([5, 6, 1], "ab", NONE) == (["a", "b", "<end>"], "text")


def test_as_many_characters_as_tokens_by_accident_are_not_believed() -> None:
    assert token_texts([5, 5, 6], "abc", NONE) == (["5", "5", "6"], "ids")  # one token, two characters
    assert token_texts([5, 6, 7], "aab", NONE) == (["5", "6", "7"], "ids")  # one character, two tokens


def test_other_tokens_are_decoded_by_the_newest_checkpoint(tmp_path: Path) -> None:
    known = decoder(tmp_path, hello=0, world=1, a=2)
    assert token_texts([0, 2, 1], "helloaworld", known) == (["hello", "a", "world"], "decoded")


def test_tokens_that_no_one_can_decode_are_shown_as_ids(tmp_path: Path) -> None:
    assert token_texts([7, 8], "hello world", NONE) == (["7", "8"], "ids")
    (tmp_path / "step-000001").mkdir()
    (tmp_path / "step-000001" / "tokenizer.json").write_text("{}")
    assert token_texts([7, 8], "hello world", Decoder(tmp_path)) == (["7", "8"], "ids")


def test_a_response_shows_every_number_of_every_token(tmp_path: Path) -> None:
    table = pq.read_table(make_run(tmp_path / "run", 5) / "rollouts" / "step-000005.parquet")
    page = response(table, 5, 2, NONE)
    assert (page["texts"], page["source"]) == (["1", "2", "<end>"], "text")
    assert page["versions"] == [2, 3, 3]
    assert page["ages"] == [2, 1, 1]
    assert page["log_ratio"] == pytest.approx([0.1, -0.1, 0], abs=1e-6)
    assert page["logprobs"]["behavior"] == [-0.5, -0.25, -0.125]
    assert set(page["logprobs"]) == {"behavior", "step_start", "policy", "reference"}
    with pytest.raises(IndexError):
        response(table, 5, 4, NONE)
    with pytest.raises(IndexError):
        response(table, 5, -1, NONE)


def test_responses_come_in_the_asked_order(tmp_path: Path) -> None:
    table = pq.read_table(make_run(tmp_path / "run", 5) / "rollouts" / "step-000005.parquet")
    orders = {
        sort: [one["row"] for one in responses(table, 5, sort, 0)["responses"]]
        for sort in ("recorded", "age", "reward")
    }
    assert orders == {"recorded": [0, 1, 2, 3], "age": [2, 3, 0, 1], "reward": [0, 2, 1, 3]}
    first = responses(table, 5, "recorded", 0)["responses"][0]
    assert (first["tokens"], first["age"], first["ratio"], first["cut"]) == (3, 1, 0.1, 1)
    assert responses(table, 5, "recorded", 3)["responses"][0]["row"] == 3
