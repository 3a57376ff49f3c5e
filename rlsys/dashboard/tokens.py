"""The responses of one recorded step, and one response token by token."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from rlsys.dashboard.recorded import flat, offsets
from rlsys.dashboard.series import numbers

Sort = Literal["recorded", "ratio", "age", "reward", "length"]
SORTS: tuple[Sort, ...] = ("recorded", "ratio", "age", "reward", "length")
PAGE = 60
"""Responses listed at once."""
END = "<end>"
"""Shown for an end token, which leaves no text."""
LOGPROBS = ("behavior", "step_start", "policy", "reference")


class Decoder:
    """The tokenizer of a run's newest checkpoint, if there is one."""

    def __init__(self, checkpoints: Path) -> None:
        self._checkpoints = checkpoints
        self._loaded: tuple[Path | None, Any] = (None, None)

    def pieces(self, ids: Sequence[int]) -> list[str] | None:
        """The text each token adds; empty for one that only completes a character with a later one.

        None without a tokenizer, or with one that does not know these tokens.
        """
        tokenizer = self._tokenizer()
        if tokenizer is None:
            return None
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        try:
            return [stream.step(tokenizer, int(token)) or "" for token in ids]
        except Exception:  # the library raises a bare Exception for ids it cannot decode
            return None

    def _tokenizer(self) -> Any:
        newest = max(self._checkpoints.glob("step-*/tokenizer.json"), default=None)
        if newest is not None and newest != self._loaded[0]:
            from tokenizers import Tokenizer

            try:
                self._loaded = newest, Tokenizer.from_file(str(newest))
            except Exception:  # a bare Exception again: a file that is no tokenizer, or just being removed
                self._loaded = newest, None
        return self._loaded[1] if newest is not None else None


def token_texts(ids: Sequence[int], text: str, decoder: Decoder) -> tuple[list[str], Literal["text", "decoded", "ids"]]:
    """What to show for each token, and where it is from.

    The tokenizer's pieces when they spell the recorded text; otherwise the characters of the text, when there is
    one for every token (or for all but a last end token, which leaves none) and equal tokens have equal
    characters; otherwise the ids stand for themselves.
    """
    pieces = decoder.pieces(ids)
    if pieces is not None and "".join(pieces).startswith(text):
        return pieces, "decoded"
    if len(text) in (len(ids), len(ids) - 1):
        pairs = set(zip(ids, text, strict=False))
        if len(pairs) == len({token for token, _ in pairs}) == len(set(text)):
            return [*text, *([END] * (len(ids) - len(text)))], "text"
    if pieces is not None:
        return pieces, "decoded"
    return [str(token) for token in ids], "ids"


def responses(table: pa.Table, step: int, sort: Sort, offset: int) -> dict[str, Any]:
    """One page of a step's responses, each with what one would choose it by."""
    rows = _overview(table, step)
    keys = {
        "recorded": lambda row: row["row"],
        "ratio": lambda row: -row["ratio"],
        "age": lambda row: -row["age"],
        "reward": lambda row: -row["reward"],
        "length": lambda row: -row["tokens"],
    }
    rows.sort(key=keys[sort])
    return {"step": step, "total": len(rows), "offset": offset, "responses": rows[offset : offset + PAGE]}


def _overview(table: pa.Table, step: int) -> list[dict[str, Any]]:
    ages = step - 1 - flat(table["versions"]).astype(np.int64)
    ratio = np.abs(flat(table["policy_logprobs"]).astype(float) - flat(table["behavior_logprobs"]))
    ratio = np.where(flat(table["loss_mask"]) & np.isfinite(ratio), ratio, 0.0)
    clipped = flat(table["clipped"]) | flat(table["masked"])
    columns = {
        name: table[name].to_pylist()
        for name in ("slot", "sample", "worker", "prompt_text", "response_text", "reward", "advantage")
    }
    rows = []
    for i, (a, b) in enumerate(pairwise(offsets(table["versions"]))):
        rows.append(
            {
                "row": i,
                **{name: column[i] for name, column in columns.items()},
                "tokens": int(b - a),
                "age": int(ages[a:b].max()) if b > a else 0,
                "ratio": round(float(ratio[a:b].max()), 5) if b > a else 0.0,
                "cut": int(clipped[a:b].sum()),
            }
        )
    return rows


def response(table: pa.Table, step: int, row: int, decoder: Decoder) -> dict[str, Any]:
    """Everything recorded about one response. Raises IndexError for a row that is not there."""
    if not 0 <= row < table.num_rows:
        raise IndexError(row)
    one = table.slice(row, 1).to_pylist()[0]
    ids = one["response_ids"]
    texts, source = token_texts(ids, one["response_text"], decoder)
    logprobs = {
        name: numbers(np.array(values, dtype=float))
        for name in LOGPROBS
        if (values := one.get(f"{name}_logprobs")) is not None
    }
    ratio = np.array(one["policy_logprobs"], dtype=float) - np.array(one["behavior_logprobs"], dtype=float)
    heads = ("slot", "attempt", "sample", "worker", "prompt_text", "response_text", "finish_reason", "reward")
    return {
        "step": step,
        "row": row,
        **{name: one[name] for name in heads},
        "advantage": one["advantage"],
        "seconds": round(one["finished_at"] - one["started_at"], 3),
        "source": source,
        "ids": ids,
        "texts": texts,
        "logprobs": logprobs,
        "log_ratio": numbers(ratio),
        "versions": one["versions"],
        "ages": [step - 1 - version for version in one["versions"]],
        "trained": one["loss_mask"],
        "clipped": one["clipped"],
        "masked": one["masked"],
    }
