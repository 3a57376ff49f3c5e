"""Rows of a file arrive as they were written, and every error says where."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from rlsys.config import JsonlTask
from rlsys.errors import ConfigError, DataError
from rlsys.tasks.base import Item
from rlsys.tasks.jsonl import Jsonl

ROWS = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(5)]
CHAT = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1="}]


def jsonl(path, **options):
    return Jsonl(JsonlTask(name="jsonl", path=path, **{"eval_size": 2, **options}))


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_file(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
        return path
    csv = "".join(",".join(map(str, line)) + "\n" for line in [rows[0], *(row.values() for row in rows)])
    return write(path, {".jsonl": lines(rows), ".json": json.dumps(rows), ".csv": csv}[path.suffix])


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows_and_holds_out_the_last(tmp_path, suffix):
    task = jsonl(as_file(tmp_path / f"rows{suffix}", ROWS))
    assert task.size == 3
    assert [task.train_item(index) for index in range(3)] == [Item(f"{n}+{n}=", str(2 * n)) for n in range(3)]
    assert [item.answer for item in task.eval_items()] == ["6", "8"]
    assert task.alphabet() == "+0123468="


def test_an_evaluation_file_leaves_all_rows_for_training(tmp_path):
    path = as_file(tmp_path / "train.jsonl", ROWS)
    task = jsonl(path, eval_path=as_file(tmp_path / "eval.json", ROWS[:1]))
    assert (task.size, len(task.eval_items())) == (5, 1)


@pytest.mark.parametrize(("answer", "text"), [(7, "7"), (2.5, "2.5"), (True, "True"), ("2020-01-01", "2020-01-01")])
def test_answers_become_text_unchanged(tmp_path, answer, text):
    rows = [{"prompt": "a", "answer": answer}, {"prompt": "b", "answer": 1}, {"prompt": "c", "answer": 2.5}]
    for suffix in (".jsonl", ".json"):
        assert jsonl(as_file(tmp_path / f"rows{suffix}", rows)).train_item(0).answer == text


def test_csv_answers_are_not_read_as_numbers_or_missing(tmp_path):
    task = jsonl(write(tmp_path / "rows.csv", "prompt,answer\nbond,007\nsodium,NA\nx,1\ny,2\n"))
    assert [task.train_item(0).answer, task.train_item(1).answer] == ["007", "NA"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_prompt_may_be_a_chat(tmp_path, suffix):
    rows = [{"q": CHAT, "a": 2}, {"q": CHAT[1:], "a": 2}]
    task = jsonl(as_file(tmp_path / f"rows{suffix}", rows), prompt_column="q", answer_column="a", eval_size=1)
    assert task.train_item(0) == Item("Add.\n1+1=", "2", {"messages": CHAT})
    with pytest.raises(ConfigError, match="chat template"):
        task.alphabet()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("\n \n", "has no rows"),
        (lines(ROWS[:2]) + "\n{oops\n", "line 4: not JSON"),
        ("[1]\n", "line 1: expected an object, found list"),
        (
            lines([*ROWS, {"prompt": "x", "solution": "y"}]),
            "line 6: no value in column 'answer'; it has prompt, solution",
        ),
        (lines([{"prompt": "x", "answer": None}]), "line 1: no value in column 'answer'"),
        (lines([{"prompt": [{"role": "user"}], "answer": 1}]), "line 1, column 'prompt': expected text or a list"),
        (lines([{"prompt": [], "answer": 1}]), "line 1, column 'prompt': expected text or a list"),
        (lines([{"prompt": 3, "answer": 1}]), "line 1, column 'prompt': expected text or a list"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        jsonl(write(tmp_path / "rows.jsonl", text))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.json", "[{", "not JSON"),
        ("rows.json", "{}", "expected a list of objects, found dict"),
        ("rows.csv", "", "is empty"),
        ("rows.csv", "prompt,solution\nx,y\n", "row 1: no value in column 'answer'; it has prompt, solution"),
        ("rows.parquet", "PAR?", "cannot be read"),
    ],
)
def test_a_bad_table_is_named(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        jsonl(write(tmp_path / name, text))


def test_a_path_or_size_that_cannot_work_names_its_field(tmp_path):
    path = as_file(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"task.path=.*none.jsonl: no such file"):
        jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match=r"task.eval_path=.*rows.txt: expected a file ending in .jsonl"):
        jsonl(path, eval_path=tmp_path / "rows.txt")
    with pytest.raises(ConfigError, match=r"task.eval_size=5: .*has 5 rows; allowed: < 5"):
        jsonl(path, eval_size=5)
