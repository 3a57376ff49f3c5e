"""Any dataset of the reasoning-gym library, scored by that dataset's own scorer."""

import dataclasses
import difflib
from functools import cached_property
from typing import Any, cast

from rlsys.config import ReasoningGymTask
from rlsys.errors import ConfigError, RewardError
from rlsys.records import Prompt, Response
from rlsys.tasks.base import Item, Task
from rlsys.tasks.containment import harmless, literals_only
from rlsys.tasks.seeding import derive_seed

_PROBE = 32
_ATTEMPTS = 128


class ReasoningGym(Task):
    """Questions of one reasoning-gym dataset, generated when first asked for and kept.

    Held-out questions come from a seed of their own; a training question whose text is among them is drawn
    again from a further seed. `info["entry"]` is the library's own entry, which its scorer needs.
    """

    def __init__(self, config: ReasoningGymTask, seed: int) -> None:
        """Raises ConfigError if `task.dataset` is unknown or refuses `task.options`."""
        self._config, self._seed = config, seed
        self._datasets: dict[tuple[str, int], Any] = {}
        self._train: dict[int, Item] = {}
        self.size, self.chat = config.size, config.chat
        _check_options(config)
        literals_only()
        self._dataset("train", 0)

    def train_item(self, index: int) -> Item:
        """Training question `index`. Raises ConfigError if nearly every question is held out."""
        if not 0 <= index < self.size:
            raise IndexError(f"training item {index} is outside 0..{self.size - 1}")
        if index not in self._train:
            draws = (self._draw("train", attempt, index) for attempt in range(_ATTEMPTS))
            item = next((draw for draw in draws if draw.text not in self._held_out), None)
            if item is None:
                raise self._too_few_questions()
            self._train[index] = item
        return self._train[index]

    def eval_items(self) -> list[Item]:
        """The held-out questions."""
        return list(self._eval)

    def score(self, prompt: Prompt, response: Response) -> float:
        """The dataset's own score in [0, 1]; 0.0 for a response that was cut off, or that tries to run as code.

        Some scorers raise on a response they cannot read. That response is wrong (0.0), provided that the
        scorer can read the entry's own answer; otherwise the scorer is at fault: RewardError.
        """
        entry = cast(dict[str, Any], prompt.info["entry"])
        if not (response.finished and harmless(entry["metadata"]["source_dataset"], response.text)):
            return 0.0
        scorer, name = self._dataset("train", 0).score_answer, self._config.dataset
        try:
            score = float(scorer(response.text, entry))
        except Exception as error:
            try:
                scorer(entry["answer"] or "", entry)
            except Exception:
                raise RewardError(f"scorer of {name!r} raised on its own answer {entry['answer']!r}") from error
            return 0.0
        if not 0 <= score <= 1:
            raise RewardError(f"scorer of {name!r} returned {score}, outside [0, 1], for {response.text!r:.80}")
        return score

    @cached_property
    def _eval(self) -> list[Item]:
        return [self._draw("eval", 0, index) for index in range(self._config.eval_size)]

    @cached_property
    def _held_out(self) -> frozenset[str]:
        """Texts of the held-out questions. Raises ConfigError if they are most of what the dataset can ask."""
        texts = frozenset(item.text for item in self._eval)
        probe = [self._draw("train", 0, index).text in texts for index in range(min(_PROBE, self.size))]
        if 2 * sum(probe) > len(probe):
            raise self._too_few_questions()
        return texts

    def _draw(self, stream: str, attempt: int, index: int) -> Item:
        entry = self._dataset(stream, attempt)[index]
        # Datasets with many right answers give none.
        return Item(str(entry["question"]), str(entry["answer"] or ""), {"entry": entry})

    def _dataset(self, stream: str, attempt: int) -> Any:
        """The library's dataset for one stream.

        Item i of a dataset seeded s is item i-1 of one seeded s+1, so seeds are hashed apart.
        """
        if (stream, attempt) not in self._datasets:
            size = self._config.eval_size if stream == "eval" else self.size
            seed = derive_seed(self._seed, "reasoning_gym", stream, attempt)
            self._datasets[stream, attempt] = _create(self._config, size, seed)
        return self._datasets[stream, attempt]

    def _too_few_questions(self) -> ConfigError:
        return ConfigError(
            f"task.eval_size={self._config.eval_size}: that holds out most questions of {self._config.dataset!r} "
            f"with task.options={self._config.options}; lower it, or widen the options"
        )


def _check_options(config: ReasoningGymTask) -> None:
    """Raise ConfigError for an unknown dataset or option, with what is allowed."""
    from reasoning_gym.factory import DATASETS

    if config.dataset not in DATASETS:
        nearest = difflib.get_close_matches(config.dataset, DATASETS, n=3, cutoff=0)
        raise ConfigError(f"task.dataset={config.dataset!r} is not in reasoning-gym; nearest: {', '.join(nearest)}")
    fields = {field.name for field in dataclasses.fields(DATASETS[config.dataset][1])} - {"seed", "size"}
    if unknown := sorted(config.options.keys() - fields):
        raise ConfigError(f"task.options.{unknown[0]}: {config.dataset!r} takes {', '.join(sorted(fields))}")


def _create(config: ReasoningGymTask, size: int, seed: int) -> Any:
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec

    options = dict(config.options)
    try:
        if config.dataset == "composite":
            options["datasets"] = [DatasetSpec(**spec) for spec in options.get("datasets", [])]
        return reasoning_gym.create_dataset(config.dataset, size=size, seed=seed, **options)
    except Exception as error:  # asserts, TypeErrors and others, as each dataset likes
        raise ConfigError(f"task.options={config.options}: {config.dataset!r} refused them: {error}") from error
