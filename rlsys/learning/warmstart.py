"""The supervised phase that gives a tiny model something for reinforcement learning to improve.

Cross-entropy on answers and end token; then a few steps on partly wrong answers, so that the model knows more
than it says. The result is cached under the hash of everything it depends on, and written whole or not at all.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlsys.config.schema import ModelConfig, WarmstartConfig
from rlsys.errors import DataError
from rlsys.learning.checkpoint import write_atomically
from rlsys.learning.packing import Sequences, pack
from rlsys.learning.policy import Policy, load_policy, load_tokenizer, quiet
from rlsys.learning.tiny import make_tiny, unknown_characters
from rlsys.records import IntArray

RECIPE = 2
"""Part of the cache key: raise it when the recipe here changes its result."""

POOL = 50_000
"""Training items looked at, at most."""

NOISY_STEPS = 100
"""Steps on partly wrong answers: too few to forget the right ones."""

ROW_TOKENS = 64
SEQUENCES_PER_ROW = 4
"""At least, of the longest: what a task's questions have in common is computed once a row."""
MICRO_BATCH_TOKENS = 4096

Progress = Callable[[int, int, float], None]
"""Called with (steps done, steps, mean loss in nats per token)."""


class Item(Protocol):
    """A question and its answer."""

    @property
    def text(self) -> str:
        """What the model is shown."""

    @property
    def answer(self) -> str:
        """What it should say before it ends."""


class Task(Protocol):
    """What a warm start needs of a task; `rlsys.tasks.Task` is one."""

    size: int

    def train_item(self, index: int) -> Item:
        """Training item `index` < size."""

    def alphabet(self) -> str:
        """Every character of the task."""


def ensure_warmstart(model: ModelConfig, task: Task, seed: int, progress: Progress | None = None) -> Path:
    """Directory of the tiny model warm-started on `task`, made now or found in the cache.

    Raises DataError when an item does not fit the alphabet or the model's context.
    """
    config, alphabet = model.warmstart, task.alphabet()
    indices = _pool(task.size, seed)
    items = [task.train_item(index) for index in indices]
    directory = config.cache_dir / _key(model, seed, alphabet, items)
    if (directory / "config.json").is_file():
        return directory

    def write(temporary: Path) -> None:
        make_tiny(model.tiny, alphabet, temporary, seed=seed)
        tokenizer = load_tokenizer(temporary)
        policy = load_policy(temporary, "float32")
        data = _tokenize(tokenizer, items, model.max_context)
        train_supervised(policy, data, config, config.steps, seed, progress)
        if config.label_noise > 0:
            gentle = config.model_copy(update={"lr": config.lr / 10})
            train_supervised(policy, _corrupt(data, config.label_noise, seed), gentle, NOISY_STEPS, seed + 1)
        with quiet():
            policy.model.save_pretrained(temporary)

    with contextlib.suppress(FileExistsError):  # made meanwhile by another process: the same bytes
        write_atomically(directory, write, replace=False)
    return directory


def train_supervised(
    policy: Policy,
    data: tuple[Sequence[Sequence[int]], Sequence[IntArray]],
    config: WarmstartConfig,
    steps: int,
    seed: int,
    progress: Progress | None = None,
) -> None:
    """Minimise −mean log π(answer tokens and end | question). `data`: questions and answers as ids.

    AdamW(0.9, 0.95), warm-up over 5% of the steps, then linear decay to zero; gradient norm at most 1. Every
    epoch visits the items in a new order drawn from `seed`.
    """
    questions, answers = data
    longest = max(len(q) + len(a) for q, a in zip(questions, answers, strict=True))
    row_tokens = max(ROW_TOKENS, SEQUENCES_PER_ROW * longest)
    optimizer = torch.optim.AdamW(
        policy.model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    order = _epochs(len(questions), steps * config.batch_size, seed)
    rise = max(1, steps // 20)
    fall = max(1, steps - rise)
    for step in range(steps):
        chosen = order[step * config.batch_size : (step + 1) * config.batch_size]
        batch = Sequences(
            prompts=[questions[i] for i in chosen],
            responses=[answers[i] for i in chosen],
            prompt_of=range(len(chosen)),
        )
        tokens = int(batch.offsets()[-1])
        loss = 0.0
        for micro in pack(batch, row_tokens=row_tokens, micro_batch_tokens=MICRO_BATCH_TOKENS).micro_batches:
            part = -policy.token_logprobs(micro, 1.0).logprobs.sum() / tokens
            torch.autograd.backward(part)
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = config.lr * min((step + 1) / rise, (steps - step) / fall)
        optimizer.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(step + 1, steps, loss)


def _pool(size: int, seed: int) -> list[int]:
    """Indices of the items used: all, or POOL of them at random."""
    random = np.random.default_rng((seed, 0))
    if size <= POOL:
        return list(range(size))
    return sorted({int(i) for i in random.integers(0, size, POOL)})


def _key(model: ModelConfig, seed: int, alphabet: str, items: Sequence[Item]) -> str:
    """Hash of everything the result depends on, 16 hexadecimal digits."""
    depends_on: Mapping[str, object] = {
        "recipe": RECIPE,
        "seed": seed,
        "tiny": model.tiny.model_dump(mode="json"),
        "warmstart": model.warmstart.model_dump(mode="json", exclude={"cache_dir"}),
        "alphabet": alphabet,
        "items": [(item.text, item.answer) for item in items],
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], max_context: int
) -> tuple[list[list[int]], list[IntArray]]:
    """Questions, and answers with the end token. Raises DataError for a lost character or too long an item."""
    texts, replies = [item.text for item in items], [item.answer for item in items]
    if lost := unknown_characters(tokenizer, "".join(dict.fromkeys("".join(texts + replies)))):
        raise DataError(f"task.alphabet() lacks {lost!r}, which its training items contain")
    questions = tokenizer(texts, add_special_tokens=False).input_ids
    answers = [
        np.asarray([*ids, tokenizer.eos_token_id], dtype=np.int32)
        for ids in tokenizer(replies, add_special_tokens=False).input_ids
    ]
    for text, question, answer in zip(texts, questions, answers, strict=True):
        if len(question) + len(answer) > max_context:
            raise DataError(
                f"training item {text!r} has {len(question) + len(answer)} tokens with its answer; "
                f"model.max_context={max_context}"
            )
    return questions, answers


def _corrupt(
    data: tuple[Sequence[Sequence[int]], Sequence[IntArray]], share: float, seed: int
) -> tuple[Sequence[Sequence[int]], list[IntArray]]:
    """Change the last character of a random `share` of the answers into the next one that ends an answer."""
    questions, answers = data
    last = sorted({int(answer[-2]) for answer in answers if len(answer) > 1})
    following = dict(zip(last, [*last[1:], *last[:1]], strict=True))
    noisy = list(answers)
    for i in np.flatnonzero(np.random.default_rng((seed, 1)).random(len(answers)) < share):
        if len(answers[i]) > 1:
            noisy[i] = answers[i].copy()
            noisy[i][-2] = following[int(answers[i][-2])]
    return questions, noisy


def _epochs(items: int, draws: int, seed: int) -> np.ndarray:
    """`draws` indices: one random order of all items after another."""
    random = np.random.default_rng((seed, 2))
    return np.concatenate([random.permutation(items) for _ in range(-(-draws // items))])[:draws]
