"""A causal language model as the learner sees it: packed tokens in, log-probabilities out."""

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from rlsys.algo.logprobs import entropy, token_logprobs
from rlsys.config.schema import Dtype
from rlsys.errors import ConfigError
from rlsys.learning.packing import Packed, Sequences, pack

LOGIT_ELEMENTS = 1 << 24
"""Logits held at once (64 MiB in float32); more are computed chunk by chunk and recomputed for the gradient."""


class TokenOutput(NamedTuple):
    """log π of each response token [N], float32 with gradient; entropy [N] before it ([0] if not asked for). Nats."""

    logprobs: Tensor
    entropy: Tensor


class Policy(nn.Module):
    """A Hugging Face causal LM.

    `direct_head`: logits are the output embedding of the decoder's last state, so that they need only be
    computed where a response token is predicted. Models that do more (soft caps, scales) get a full forward.
    It is a module because `fully_shard` hooks into one: `forward` is everything that touches a parameter.
    """

    def __init__(self, model: PreTrainedModel, direct_head: bool) -> None:
        super().__init__()
        self.model = model
        self.direct_head = direct_head

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding (may exceed the tokenizer's size)."""
        return int(self.model.config.get_text_config().vocab_size)

    def token_logprobs(self, packed: Packed, temperature: float, *, with_entropy: bool = False) -> TokenOutput:
        """log π(y_t | s_t) after temperature for all N response tokens of a micro-batch, in its token order."""
        packed = packed.to(self.device)
        inputs = {
            "input_ids": packed.input_ids,
            "position_ids": packed.position_ids,
            "attention_mask": _additive(packed.mask(), self.model.dtype),
            "use_cache": False,
        }
        output: TokenOutput = self(inputs, packed.predictors, packed.token_ids, temperature, with_entropy)
        return output

    def forward(
        self,
        inputs: Mapping[str, Tensor | bool],
        predictors: Tensor,
        token_ids: Tensor,
        temperature: float,
        with_entropy: bool,
    ) -> TokenOutput:
        """`token_logprobs` of tokens that are predicted at the flat places `predictors` [N] of the model's `inputs`."""
        if not self.direct_head:
            logits = self.model(**inputs).logits.flatten(0, 1)[predictors]
            measured = entropy(logits, temperature) if with_entropy else logits.new_empty(0)
            return TokenOutput(token_logprobs(logits, token_ids, temperature), measured)
        states = self.model.base_model(**inputs).last_hidden_state
        states = states.flatten(0, 1).index_select(0, predictors)
        return self._head(states, token_ids, temperature, with_entropy)

    def _head(self, states: Tensor, token_ids: Tensor, temperature: float, with_entropy: bool) -> TokenOutput:
        """Output head over chunks of tokens. states: [N, H], token_ids: [N]."""
        head = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]

        def chunk(part: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
            logits = head(part)
            measured = entropy(logits, temperature) if with_entropy else logits.new_empty(0)
            return token_logprobs(logits, ids, temperature), measured

        size = max(1, LOGIT_ELEMENTS // self.vocab_size)
        if len(token_ids) <= size:
            logprobs, measured = chunk(states, token_ids)
        else:
            parts = [
                checkpoint(chunk, part, ids, use_reentrant=False)
                for part, ids in zip(torch.split(states, size), torch.split(token_ids, size), strict=True)
            ]
            logprobs, measured = (torch.cat(column) for column in zip(*parts, strict=True))
        return TokenOutput(logprobs, measured)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor) of every parameter and saved buffer; tied ones once, under their first name."""
        seen: set[Hashable] = set()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if (key := _storage(tensor)) not in seen:
                seen.add(key)
                yield name, tensor.detach()

    def tied_names(self) -> Mapping[str, str]:
        """Names that `named_tensors` leaves out, each with the name it shares its tensor with.

        With tied embeddings: {"lm_head.weight": "model.embed_tokens.weight"}.
        """
        first: dict[Hashable, str] = {}
        tied = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            original = first.setdefault(_storage(tensor), name)
            if original != name:
                tied[name] = original
        return tied


def load_policy(path: str | Path, dtype: Dtype, *, device: str = "cpu", gradient_checkpointing: bool = False) -> Policy:
    """Load a directory of safetensors, checked to give the same log-probabilities packed as alone.

    Dropout is off for good: a ratio between two random networks is noise. Raises ConfigError when the
    directory cannot be loaded or the architecture does not obey a block mask (a recurrent state, say).
    """
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation="sdpa",
            )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"model.path={str(path)!r} is not a Hugging Face causal LM with config.json and *.safetensors: {error}"
        ) from error
    _disable_dropout(model)
    model.to(torch.device(device))  # type: ignore[arg-type]
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return _checked(model)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model. Raises ConfigError when there is none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model.path={str(path)!r} has no usable tokenizer: {error}") from error
    return tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _checked(model: PreTrainedModel) -> Policy:
    """Choose the cheapest forward whose packed log-probabilities equal those of sequences fed alone."""
    vocabulary = model.config.get_text_config().vocab_size
    random = np.random.default_rng(0)
    prompts = [random.integers(0, vocabulary, n).tolist() for n in (3, 5)]
    responses = [random.integers(0, vocabulary, n).astype(np.int32) for n in (4, 2, 6)]
    sequences = Sequences(prompts=prompts, responses=responses, prompt_of=[0, 0, 1])
    packed = pack(sequences, row_tokens=32, micro_batch_tokens=64).micro_batches[0]
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.2
    with torch.no_grad():
        expected = torch.cat([_alone(model, prompts[p], r) for p, r in zip((0, 0, 1), responses, strict=True)])
        for direct_head in (True, False):
            policy = Policy(model, direct_head)
            try:
                found = policy.token_logprobs(packed, 1.0).logprobs
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                continue
            if torch.allclose(found, expected, rtol=0, atol=tolerance):
                return policy
    raise ConfigError(
        f"model type {model.config.model_type!r} gives other log-probabilities for packed sequences than for single "
        "ones: it does not follow a four-dimensional attention mask and position_ids"
    )


def _alone(model: PreTrainedModel, prompt: list[int], response: np.ndarray) -> Tensor:
    """Log-probabilities of one response by a plain forward pass, [T]."""
    ids = torch.tensor([prompt + response.tolist()], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return token_logprobs(logits, ids[0, len(prompt) :], 1.0)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where attention is allowed, the lowest number elsewhere: converted once, not in every layer."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


def _disable_dropout(model: PreTrainedModel) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _storage(tensor: Tensor) -> Hashable:
    """What two names of one tensor have in common. A sharded one is told by itself: its shard here may be empty."""
    if isinstance(tensor, DTensor):
        return id(tensor)
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tuple(tensor.shape)
