"""What can be checked before any actor starts: trackers, task, reward, model directory, prompt lengths, cluster."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlsys.config.schema import JsonlTask, RunConfig
from rlsys.control import transports
from rlsys.errors import ConfigError
from rlsys.observability.trackers import require_trackers
from rlsys.records import Prompt
from rlsys.rewards import exact_match, resolve_reward
from rlsys.tasks import PromptSource, build_task, check_lengths, make_encoder, make_prompt

SAMPLE = 64
"""Training prompts whose length is checked in advance; held-out ones all are."""

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


@dataclass(frozen=True, slots=True)
class Prompts:
    """A run's training prompts and its held-out ones."""

    source: PromptSource
    held_out: Sequence[Prompt]


def check_config(config: RunConfig, *, elsewhere: bool = False) -> list[str]:
    """Everything that can be known without a tokenizer. Raises ConfigError or DataError; returns remarks.

    `elsewhere`: the run is for another machine, where its trackers are installed and absolute paths lead.
    """
    remarks: list[str] = []
    if not elsewhere:
        require_trackers(config.observability.sinks)
    if elsewhere and (absent := _absent_data(config)):
        remarks.append(f"{absent} is not here: its rows are checked when the run starts")
        resolve_reward(config.reward.function, exact_match)
    else:
        task = build_task(config.task, config.seed)
        resolve_reward(config.reward.function, task.score)
        if config.model.path is None:
            task.alphabet()
    if config.model.path is None:
        check_head_size(config)
    elif not (elsewhere and Path(config.model.path).is_absolute()):
        remarks += check_model_directory(config.model.path, config.model.max_context)
    for role in ("learner", "rollout", "reference"):
        if getattr(config.resources, f"{role}_gpus") > 0:
            remarks.append(f"resources.{role}_gpus > 0: this run needs a GPU; everything but that was checked")
            break
    remarks += transports.remark(config)
    if config.audit.every and config.rollout.dtype != config.model.dtype:
        remarks.append(
            f"audit.every={config.audit.every}: gradients are audited at the weights as published, in "
            f"rollout.dtype={config.rollout.dtype}; the learner's are {config.model.dtype}"
        )
    return remarks


def _absent_data(config: RunConfig) -> Path | None:
    """An absolute path of the task's files that does not exist on this machine."""
    if not isinstance(config.task, JsonlTask):
        return None
    paths = (config.task.path, config.task.eval_path)
    return next((path for path in paths if path is not None and path.is_absolute() and not path.exists()), None)


def check_head_size(config: RunConfig) -> None:
    """Raise ConfigError for a tiny model whose attention heads the engine has no kernel for."""
    tiny = config.model.tiny
    size = tiny.hidden_size // tiny.heads
    if config.resources.rollout_gpus == 0 and size not in CPU_HEAD_SIZES:
        allowed = ", ".join(map(str, CPU_HEAD_SIZES))
        raise ConfigError(f"model.tiny: hidden_size/heads={size}: vLLM on CPUs has attention for {allowed}")


def check_model_directory(path: str, max_context: int) -> list[str]:
    """Raise ConfigError for a local directory that holds no usable model; remark on a hub name."""
    directory = Path(path)
    if not directory.is_dir():
        if directory.is_absolute() or path.startswith(".") or path.count("/") != 1:
            raise ConfigError(
                f"model.path={path}: no such directory; expected a Hugging Face model directory or hub name"
            )
        return [f"model.path={path} is not a local directory; it will be fetched from the Hugging Face hub"]
    for needed, what in (("config.json", "model configuration"), ("tokenizer_config.json", "tokenizer")):
        if not (directory / needed).is_file():
            raise ConfigError(f"model.path={path}: {needed} is missing; expected a directory with a {what}")
    if not any(directory.glob("*.safetensors")):
        raise ConfigError(f"model.path={path}: no *.safetensors file; only safetensors weights are loaded")
    limit = json.loads((directory / "config.json").read_text()).get("max_position_embeddings")
    if limit is not None and max_context > limit:
        raise ConfigError(f"model.max_context={max_context}: this model has {limit} positions; allowed: 1..{limit}")
    return []


def load_prompts(config: RunConfig, path: str) -> Prompts:
    """Training and held-out prompts, tokenized for the model at `path`. Raises DataError when one cannot fit."""
    from transformers import AutoConfig, AutoTokenizer

    task = build_task(config.task, config.seed)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    vocabulary = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise ConfigError(
            f"model.path={path}: its tokenizer has {len(tokenizer)} tokens, the model {vocabulary}: "
            "they do not belong together"
        )
    encode = make_encoder(tokenizer, task.chat)
    source = PromptSource(task, encode, config.seed)
    items = task.eval_items()[: config.eval.max_prompts]
    held_out = [make_prompt(item, encode, epoch=0, index=i) for i, item in enumerate(items)]
    sample = (make_prompt(task.train_item(i), encode, epoch=0, index=i) for i in range(min(SAMPLE, task.size)))
    for prompts in (held_out, sample):
        check_lengths(prompts, max_context=config.model.max_context, max_new_tokens=config.rollout.max_new_tokens)
    return Prompts(source, held_out)
