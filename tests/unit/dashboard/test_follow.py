"""A file is followed line by line, and read again when its past has changed."""

import json
from pathlib import Path

from rlsys.dashboard.follow import Follower


def test_only_what_is_new_is_returned(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    follower = Follower(path)
    assert follower.poll() == []
    path.write_text('{"n": 1}\n{"n": 2}\n')
    assert follower.poll() == [{"n": 1}, {"n": 2}]
    assert follower.poll() == []
    with path.open("a") as file:
        file.write('{"n": 3}\n')
    assert follower.poll() == [{"n": 3}]
    assert follower.generation == 0


def test_a_cut_last_line_is_returned_once_and_whole_when_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    whole = json.dumps({"text": "ü ∑", "n": 2}, ensure_ascii=False).encode() + b"\n"
    follower = Follower(path)
    for cut in range(1, len(whole)):  # also in the middle of a character
        path.write_bytes(b'{"n": 1}\n' + whole[:cut])
        follower = Follower(path)
        assert follower.poll() == [{"n": 1}]
        with path.open("ab") as file:
            file.write(whole[cut:])
        assert follower.poll() == [{"text": "ü ∑", "n": 2}]
    assert follower.skipped == 0


def test_a_file_that_shrank_is_read_again_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n{"n": 3')
    follower = Follower(path)
    follower.poll()
    path.write_text('{"n": 1}\n')
    assert follower.poll() == [{"n": 1}]
    assert follower.generation == 1


def test_a_file_that_was_replaced_by_a_longer_one_is_read_again(tmp_path: Path) -> None:
    path, other = tmp_path / "x.jsonl", tmp_path / "x.tmp"
    path.write_text('{"n": 1}\n{"n": 2}\n')
    follower = Follower(path)
    follower.poll()
    other.write_text('{"n": 1}\n{"n": 20}\n{"n": 30}\n')
    other.replace(path)
    assert follower.poll() == [{"n": 1}, {"n": 20}, {"n": 30}]
    assert follower.generation == 1


def test_a_line_that_is_no_object_is_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"n": 1}\nnot json\n[1, 2]\n\n\xff\xfe\n{"n": 2}\n')
    follower = Follower(path)
    assert follower.poll() == [{"n": 1}, {"n": 2}]
    assert follower.skipped == 3


def test_a_trace_reads_line_by_line_and_says_when_it_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text('[\n{"ph": "M"},\n{"ph": "X"},\n')
    follower = Follower(path)
    assert (follower.poll(), follower.closed) == ([{"ph": "M"}, {"ph": "X"}], False)
    with path.open("a") as file:
        file.write('{"ph": "i"}\n]')
    assert (follower.poll(), follower.closed) == ([{"ph": "i"}], True)
    assert len(json.loads(path.read_text())) == 3


def test_a_trace_that_goes_on_after_its_end_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text('[\n{"n": 1},\n{"n": 2}\n]\n')
    follower = Follower(path)
    follower.poll()
    path.write_text('[\n{"n": 1},\n{"n": 2},\n{"n": 3},\n{"n": 4},\n')  # same file, longer than before
    assert follower.poll() == [{"n": 1}, {"n": 2}, {"n": 3}, {"n": 4}]
    assert follower.generation == 1
