"""Packed log-probabilities are those of each response alone, whatever the model and however the head is computed."""

import math

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
)

from rlsys.errors import ConfigError
from rlsys.learning import policy as policy_module
from rlsys.learning.packing import Sequences, pack
from rlsys.learning.policy import Policy, load_policy, load_tokenizer
from rlsys.learning.tiny import make_tokenizer
from tests.unit.learning.samples import ALPHABET, VOCABULARY, flat_gradient, sharpen


def random_sequences(seed: int = 0) -> Sequences:
    random = np.random.default_rng(seed)
    prompts = [random.integers(2, VOCABULARY, int(n)).tolist() for n in (3, 6, 4)]
    responses = [random.integers(2, 5, int(n)).astype(np.int32) for n in random.integers(1, 8, 12)]
    return Sequences(prompts=prompts, responses=responses, prompt_of=[0] * 5 + [1] * 3 + [2] * 4)


def flat(
    policy: Policy, sequences: Sequences, temperature: float = 1.0, row_tokens: int = 16, micro_batch_tokens: int = 32
) -> torch.Tensor:
    """Packed log-probabilities in the batch's flat order."""
    values = torch.zeros(int(sequences.offsets()[-1]))
    for micro in pack(sequences, row_tokens=row_tokens, micro_batch_tokens=micro_batch_tokens).micro_batches:
        values[micro.token_index] = policy.token_logprobs(micro, temperature).logprobs.float()
    return values


def alone(path, sequences: Sequences, temperature: float = 1.0) -> torch.Tensor:
    """The same by a plain model, one response at a time."""
    model = AutoModelForCausalLM.from_pretrained(path)
    parts = []
    for prompt_index, response in zip(sequences.prompt_of, sequences.responses, strict=True):
        prompt = sequences.prompts[prompt_index]
        ids = torch.tensor([[*prompt, *response.tolist()]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
        parts.append(logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1))
    return torch.cat(parts)


@pytest.mark.parametrize("fixture", ["tiny", "untied"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_logprobs_equal_unpacked_ones(fixture, temperature, request):
    path = request.getfixturevalue(fixture)
    sequences = random_sequences()
    policy = load_policy(path, "float32")
    assert policy.direct_head, "logits only where a token is predicted"
    packed = flat(policy, sequences, temperature)
    assert torch.allclose(packed, alone(path, sequences, temperature), atol=2e-5)
    assert packed.std() > 0.5, "the model must tell tokens apart for this to mean anything"


def test_row_and_micro_batch_sizes_do_not_change_logprobs(tiny):
    policy, sequences = load_policy(tiny, "float32"), random_sequences()
    expected = flat(policy, sequences)
    for row_tokens, micro_batch_tokens in ((1, 1), (8, 16), (64, 64), (128, 4096)):
        found = flat(policy, sequences, row_tokens=row_tokens, micro_batch_tokens=micro_batch_tokens)
        assert torch.allclose(found, expected, atol=2e-5)


def test_a_response_does_not_see_its_neighbours(tiny):
    policy, sequences = load_policy(tiny, "float32"), random_sequences()
    changed = Sequences(
        prompts=[sequences.prompts[0], [7] * 6, [8] * 4],
        responses=sequences.responses,
        prompt_of=sequences.prompt_of,
    )
    end = int(sequences.offsets()[5])
    before, after = flat(policy, sequences, row_tokens=128), flat(policy, changed, row_tokens=128)
    assert torch.allclose(before[:end], after[:end], atol=2e-5)
    assert not torch.allclose(before[end:], after[end:], atol=1e-2)


def test_entropy_is_that_of_the_tempered_distribution(tiny):
    policy = load_policy(tiny, "float32")
    sequences = Sequences(prompts=[[3, 4]], responses=[np.asarray([5], dtype=np.int32)], prompt_of=[0])
    (micro,) = pack(sequences, row_tokens=4, micro_batch_tokens=4).micro_batches
    output = policy.token_logprobs(micro, 0.5, with_entropy=True)
    logits = policy.model(input_ids=torch.tensor([[3, 4]])).logits[0, -1] / 0.5
    expected = -(logits.softmax(-1) * logits.log_softmax(-1)).sum()
    assert output.entropy.item() == pytest.approx(expected.item(), abs=1e-5)
    assert 0 < output.entropy.item() < math.log(VOCABULARY)
    assert not output.entropy.requires_grad


def test_a_head_computed_in_chunks_gives_the_same_values_and_gradient(tiny, monkeypatch):
    policy, sequences = load_policy(tiny, "float32"), random_sequences()
    (micro,) = pack(sequences, row_tokens=128, micro_batch_tokens=4096).micro_batches
    found = []
    for elements in (1 << 24, 5 * VOCABULARY):
        monkeypatch.setattr(policy_module, "LOGIT_ELEMENTS", elements)
        output = policy.token_logprobs(micro, 0.9, with_entropy=True)
        output.logprobs.square().sum().backward()
        gradient = flat_gradient(policy.model)
        policy.model.zero_grad()
        found.append((output.logprobs.detach(), output.entropy, gradient))
    for whole, chunked in zip(*found, strict=True):
        assert torch.allclose(whole, chunked, rtol=1e-4, atol=1e-4)


def test_logits_that_are_more_than_the_head_are_taken_from_a_full_forward(tmp_path):
    config = GraniteConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=0.25, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    sharpen(tmp_path)
    policy, sequences = load_policy(tmp_path, "float32"), random_sequences()
    assert not policy.direct_head
    assert torch.allclose(flat(policy, sequences), alone(tmp_path, sequences), atol=2e-5)


def test_a_model_that_ignores_the_mask_is_refused(tmp_path):
    config = Lfm2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    Lfm2ForCausalLM(config).save_pretrained(tmp_path)
    sharpen(tmp_path)
    with pytest.raises(ConfigError, match=r"lfm2.*packed"):
        load_policy(tmp_path, "float32")


def test_dropout_is_off_although_the_model_trains(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.config.attention_dropout = 0.9
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).attention_dropout == 0.9
    policy, sequences = load_policy(tmp_path, "float32"), random_sequences()
    assert policy.model.training
    assert torch.equal(flat(policy, sequences), flat(policy, sequences))
    assert torch.allclose(flat(policy, sequences), alone(tiny, sequences), atol=2e-5)


def test_gradient_checkpointing_changes_no_gradient(tiny):
    sequences = random_sequences()
    (micro,) = pack(sequences, row_tokens=128, micro_batch_tokens=4096).micro_batches
    gradients = []
    for checkpointing in (False, True):
        policy = load_policy(tiny, "float32", gradient_checkpointing=checkpointing)
        policy.token_logprobs(micro, 1.0).logprobs.sum().backward()
        gradients.append(flat_gradient(policy.model))
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


def test_tied_tensors_are_named_once_and_reported(tiny, untied):
    tied_policy, untied_policy = load_policy(tiny, "float32"), load_policy(untied, "float32")
    names = [name for name, _ in tied_policy.named_tensors()]
    assert "lm_head.weight" not in names
    assert len(names) == len(set(names))
    assert tied_policy.tied_names() == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" in dict(untied_policy.named_tensors())
    assert untied_policy.tied_names() == {}
    for policy in (tied_policy, untied_policy):
        assert {*dict(policy.named_tensors()), *policy.tied_names()} == set(policy.model.state_dict())


def test_directories_without_safetensors_or_tokenizer_are_refused_by_name(tmp_path, tiny):
    with pytest.raises(ConfigError, match=r"model\.path=.*nowhere"):
        load_policy(tmp_path / "nowhere", "float32")
    pickled = tmp_path / "pickled"
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.config.save_pretrained(pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        load_policy(pickled, "float32")
    with pytest.raises(ConfigError, match="no usable tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
    assert load_tokenizer(tiny).get_vocab() == make_tokenizer(ALPHABET, 64).get_vocab()
