"""Prompt and answer columns of a .jsonl, .json, .csv or .parquet file."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

from rlsys.config import JsonlTask
from rlsys.errors import ConfigError, DataError
from rlsys.tasks.base import Item, Task

Row = tuple[str, Mapping[str, object]]
"""Where a row stands, as errors say it (`train.jsonl, line 3`), and its columns."""


class Jsonl(Task):
    """The rows of a file. Answers are compared as text; a prompt is a string or a list of chat messages."""

    def __init__(self, config: JsonlTask) -> None:
        """Raises ConfigError for a path or eval_size that cannot work, DataError for what the file holds."""
        self.chat = config.chat
        self._train = _read_items(config.path, "task.path", config)
        if config.eval_path is not None:
            self._eval = _read_items(config.eval_path, "task.eval_path", config)
        else:
            rows = len(self._train)
            if config.eval_size >= rows:
                raise ConfigError(
                    f"task.eval_size={config.eval_size}: {config.path} has {rows} rows; allowed: < {rows}"
                )
            self._train, self._eval = self._train[: -config.eval_size], self._train[-config.eval_size :]
        self.size = len(self._train)

    def train_item(self, index: int) -> Item:
        """Row `index` of the training rows."""
        return self._train[index]

    def eval_items(self) -> list[Item]:
        """The rows of `task.eval_path`, or the last `task.eval_size` of the file."""
        return list(self._eval)


def _read_items(path: Path, field: str, config: JsonlTask) -> list[Item]:
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".csv": lambda path: _table_rows(path, config),
        ".parquet": lambda path: _table_rows(path, config),
    }
    if path.suffix not in readers:
        raise ConfigError(f"{field}={path}: expected a file ending in {', '.join(readers)}")
    if not path.is_file():
        raise ConfigError(f"{field}={path}: no such file")
    items = [_item(row, config) for row in readers[path.suffix](path)]
    if not items:
        raise DataError(f"{path} has no rows")
    return items


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        place = f"{path}, line {number}"
        if line.strip():
            yield place, _columns(_parse(line, place), place)


def _json_rows(path: Path) -> Iterator[Row]:
    rows = _parse(path.read_bytes(), str(path))
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of objects, found {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        place = f"{path}, row {number}"
        yield place, _columns(row, place)


def _parse(text: bytes, place: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:  # JSON or UTF-8
        raise DataError(f"{place}: not JSON: {error}") from error


def _columns(row: object, place: str) -> dict[str, object]:
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object, found {type(row).__name__}")
    return row


def _table_rows(path: Path, config: JsonlTask) -> Iterator[Row]:
    """Rows as the `datasets` library reads them, in memory and without touching its cache.

    Not for JSON: there it makes a time of the answer "2020-01-01" and 1.0 of a 1 beside a 2.5.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")

    from datasets import Dataset

    with tempfile.TemporaryDirectory() as cache:
        try:
            if path.suffix == ".csv":  # as text: the answer 007 is not 7, and NA is not a missing value
                as_text = {config.prompt_column: str, config.answer_column: str}
                table = Dataset.from_csv(
                    str(path), cache_dir=cache, keep_in_memory=True, converters=as_text, keep_default_na=False
                )
            else:
                table = Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
        except Exception as error:
            raise DataError(f"{path} cannot be read: {error.__cause__ or error}") from error
    for number, row in enumerate(cast(Dataset, table), start=1):
        yield f"{path}, row {number}", cast(Mapping[str, object], row)


def _item(row: Row, config: JsonlTask) -> Item:
    place, columns = row
    for column in (config.prompt_column, config.answer_column):
        if columns.get(column) is None:
            found = ", ".join(name for name, value in columns.items() if value is not None)
            raise DataError(f"{place}: no value in column {column!r}; it has {found or 'none'}")
    prompt, answer = columns[config.prompt_column], str(columns[config.answer_column])
    if isinstance(prompt, str):
        return Item(prompt, answer)
    messages = _messages(prompt, f"{place}, column {config.prompt_column!r}")
    return Item("\n".join(message["content"] for message in messages), answer, {"messages": messages})


def _messages(prompt: object, place: str) -> list[dict[str, str]]:
    """The chat in a prompt column, cleaned of keys that other rows have and a table reader filled with None."""
    messages = []
    for message in prompt if isinstance(prompt, list) and prompt else [None]:
        texts = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
        if not {"role", "content"} <= texts.keys() or not all(isinstance(text, str) for text in texts.values()):
            raise DataError(f"{place}: expected text or a list of {{role, content}} messages, found {prompt!r:.200}")
        messages.append(texts)
    return messages
