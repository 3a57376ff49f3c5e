"""Each mistake is refused with the field, the value and what is allowed, before anything starts."""

from typing import Any

import pytest

from rlsys.config import parse_config
from rlsys.errors import ConfigError

SMALLEST: dict[str, Any] = {"task": {"name": "arithmetic"}}

# What somebody might write, as overrides of the smallest configuration, and the one line that answers it.
MISTAKES = {
    "a negative temperature": (
        ["rollout.temperature=-1"],
        "rollout.temperature=-1: must be greater than 0",
    ),
    "an unknown transport": (
        ["weights.transport=rdma"],
        "weights.transport='rdma': must be 'object_store', 'gloo', 'nccl' or 'ipc'",
    ),
    "nccl without GPUs": (
        ["weights.transport=nccl"],
        "resources.learner_gpus=0.0: weights.transport=nccl needs a whole GPU each, at least 1; "
        "without GPUs allowed are object_store and gloo",
    ),
    "nccl on a shared GPU": (
        ["weights.transport=nccl", "resources.learner_gpus=1.0", "resources.rollout_gpus=0.5"],
        "resources.rollout_gpus=0.5: weights.transport=nccl needs a whole GPU each, at least 1; "
        "without GPUs allowed are object_store and gloo",
    ),
    "ipc with a worker on the CPU": (
        ["weights.transport=ipc", "resources.learner_gpus=0.5"],
        "resources.rollout_gpus=0.0: weights.transport=ipc needs a share of one GPU, more than 0; "
        "without GPUs allowed are object_store and gloo",
    ),
    "ipc over several GPUs": (
        ["weights.transport=ipc", "resources.learner_gpus=0.5", "resources.rollout_gpus=0.5", "rollout.workers=2"],
        "weights.transport='ipc': learner and workers must share one GPU, and resources.learner_gpus + rollout.workers "
        "x resources.rollout_gpus is 1.5; allowed for several GPUs are nccl and object_store",
    ),
    "a broadcast to an engine of several processes": (
        ["weights.transport=gloo", "rollout.engine_options={tensor_parallel_size: 2}"],
        "rollout.engine_options.tensor_parallel_size=2: must be 1 with weights.transport=gloo, which reaches one "
        "process a worker; weights.transport=object_store serves engines that are spread over several",
    ),
    "no workers": (
        ["rollout.workers=0"],
        "rollout.workers=0: must be at least 1",
    ),
    "a word for a number": (
        ["rollout.workers=two"],
        "rollout.workers='two': must be a whole number",
    ),
    "half a worker": (
        ["rollout.workers=1.5"],
        "rollout.workers=1.5: must be a whole number",
    ),
    "true for a number": (
        ["rollout.workers=true"],
        "rollout.workers=true: must be a whole number",
    ),
    "a number for true": (
        ["resources.pin_cores=1"],
        "resources.pin_cores=1: must be true or false",
    ),
    "nothing to divide": (
        ["learner.sharding=fsdp"],
        "learner.sharding='fsdp': needs ranks of at least 2: one rank holds everything",
    ),
    "more ranks than groups": (
        ["learner.ranks=9", "rollout.prompts_per_step=8"],
        "learner.ranks=9: must not exceed rollout.prompts_per_step=8: the others would have no work",
    ),
    "two ranks on one GPU": (
        ["learner.ranks=2", "resources.learner_gpus=0.5"],
        "resources.learner_gpus=0.5: must be a whole number with learner.ranks=2: ranks cannot share a GPU (NCCL)",
    ),
    "a learning rate in words": (
        ["learner.lr=small"],
        "learner.lr='small': must be a number",
    ),
    "an infinite learning rate": (
        ["learner.lr=.inf"],
        "learner.lr=inf: must be a finite number",
    ),
    "noise beyond all labels": (
        ["model.warmstart.label_noise=1.5"],
        "model.warmstart.label_noise=1.5: must be at most 1",
    ),
    "a momentum of one": (
        ["learner.betas=[0.9, 1.0]"],
        "learner.betas[1]=1.0: must be less than 1",
    ),
    "three momenta": (
        ["learner.betas=[0.9, 0.95, 0.99]"],
        "learner.betas=[0.9, 0.95, 0.99]: must have at most 2 items",
    ),
    "an unknown estimator": (
        ["kl.estimator=k33"],
        "kl.estimator='k33': must be 'k1', 'k2' or 'k3'; did you mean 'k3'?",
    ),
    "an unknown operator": (
        ["task.operators=['+', '/']"],
        "task.operators[1]='/': must be '+', '-' or '*'",
    ),
    "no operator": (
        ["task.operators=[]"],
        "task.operators=[]: must name at least one of '+', '-', '*'",
    ),
    "a mistyped key": (
        ["rollout.temprature=0.7"],
        "rollout.temprature=0.7: unknown key; did you mean 'temperature'?",
    ),
    "a mistyped section": (
        ["rolout.workers=2"],
        "rolout={workers: 2}: unknown key; did you mean 'rollout'?",
    ),
    "a key of another section": (
        ["rollout.grad_clip=1"],
        "rollout.grad_clip=1: unknown key; did you mean learner.grad_clip?",
    ),
    "a key like no other": (
        ["advantage.zzz=1"],
        "advantage.zzz=1: unknown key; allowed are name",
    ),
    "a mistyped task": (
        ["task.name=arithmetics"],
        "task.name='arithmetics': must be one of 'arithmetic', 'reasoning_gym', 'jsonl', 'custom'; "
        "did you mean 'arithmetic'?",
    ),
    "no task": (
        ["task={}"],
        "task.name: missing; must be one of 'arithmetic', 'reasoning_gym', 'jsonl', 'custom'",
    ),
    "a task without what it needs": (
        ["task={name: jsonl}"],
        "task.path: missing",
    ),
    "a key of another task": (
        ["task.dataset=chain_sum"],
        "task.dataset='chain_sum': a key of 'reasoning_gym', not of 'arithmetic', which takes name, operators, digits, "
        "operands, eval_size; to change the name, replace the whole section",
    ),
    "a value for a section": (
        ["rollout=3"],
        "rollout=3: must be a section of `key: value` pairs",
    ),
    "nothing in a section": (
        ["staleness=null"],
        "staleness=null: must be a section of `key: value` pairs",
    ),
    "a run name that leaves the run directory": (
        ["name=../elsewhere"],
        "name='../elsewhere': must be a plain directory name without slashes",
    ),
    "a seed below 0": (
        ["seed=-1"],
        "seed=-1: must be at least 0",
    ),
    "a seed that leaves no room for a worker's number": (
        ["seed=2147483648"],
        "seed=2147483648: must be less than 2147483648",
    ),
    "a number for a name": (
        ["name=7"],
        "name=7: must be text; put a number or a date in quotes",
    ),
    "an unknown reward": (
        ["reward.function=bleu"],
        "reward.function='bleu': must be 'task', 'exact_match', 'math_verify', or package.module:function",
    ),
    "a task class that is not a name": (
        ["task={name: custom, target: my-module:Task}"],
        "task.target='my-module:Task': must be package.module:name",
    ),
    "heads that do not divide": (
        ["model.tiny.heads=3"],
        "model.tiny.heads=3: must divide hidden_size=128",
    ),
    "truncated sampling": (
        ["rollout.top_p=0.9"],
        "rollout.top_p=0.9: must be 1: truncated sampling scales every importance ratio by the mass it cuts off; "
        "lower the temperature instead",
    ),
    "a lag beyond the bound": (
        ["staleness.max=1", "staleness.serving_lag=2"],
        "staleness.serving_lag=2: must not exceed max=1",
    ),
    "a backlog without slots for it": (
        ["staleness.max=4", "staleness.backlog=4"],
        "staleness.backlog=4: must be at most 3: 256 prompts may be open, rollout.prompts_per_step=64 of them a batch "
        "(staleness.serving_lag=0 leaves the whole of staleness.max to the queue)",
    ),
    "a window without slots for it": (
        ["staleness.max=0", "staleness.window=9", "rollout.prompts_per_step=4"],
        "staleness.window=9: must be at most 1: it leaves -4 open prompts, fewer than rollout.prompts_per_step=4",
    ),
    "an option of another objective": (
        ["objective.cap=3.0"],
        "objective.cap=3.0: not used by 'ppo_clip', which takes clip_high, clip_low, dual_clip",
    ),
    "an option of another correction": (
        ["objective.correction.name=tis", "objective.correction.tau=0.04"],
        "objective.correction.tau=0.04: not used by 'tis', which takes cap",
    ),
    "an empty interval": (
        ["objective.correction={name: mask_token, low: 2.0, high: 0.5}"],
        "objective.correction.low=2.0: must be less than high=0.5",
    ),
    "a lower bound above the upper one's default": (
        ["objective.correction={name: mask_token, low: 6.0}"],
        "objective.correction.low=6.0: must be less than high=5.0, its default with name=mask_token",
    ),
    "an upper bound below the lower one's default": (
        ["objective.correction={name: mask_sequence, high: 0.8}"],
        "objective.correction.high=0.8: must be greater than low=0.8, its default with name=mask_sequence",
    ),
    "token masks under one weight per response": (
        ["objective.name=gspo", "objective.correction=m2"],
        "objective.correction.name='m2': masks single tokens, but 'gspo' has one weight per response; "
        "must be 'none', 'tis' or 'mask_sequence'",
    ),
    "a KL term without a reference": (
        ["kl.coef=0.1", "kl.reference=false"],
        "kl.reference=false: must be true with coef=0.1: a KL term needs the reference actor",
    ),
    "a KL term that begins later, without a reference": (
        ["kl.schedule=linear", "kl.final_coef=0.01", "kl.reference=false"],
        "kl.reference=false: must be true with final_coef=0.01: a KL term needs the reference actor",
    ),
    "a KL loss that begins later and has no gradient": (
        ["kl.schedule=linear", "kl.final_coef=0.01", "kl.estimator=k1"],
        "kl.estimator='k1': must be 'k2' or 'k3' with placement=loss, where the gradient of k1 is zero on average; "
        "or set placement=reward",
    ),
    "the end of a KL schedule that is none": (
        ["kl.coef=0.1", "kl.final_coef=0.01"],
        "kl.final_coef=0.01: not used by 'fixed', which takes no options",
    ),
    "options of another KL schedule": (
        ["kl.coef=0.1", "kl.schedule=linear", "kl.target=2.0", "kl.horizon=500"],
        "kl.horizon=500: not used by 'linear', which takes final_coef (target neither)",
    ),
    "a KL loss that has no gradient": (
        ["kl.coef=0.1", "kl.estimator=k1"],
        "kl.estimator='k1': must be 'k2' or 'k3' with placement=loss, where the gradient of k1 is zero on average; "
        "or set placement=reward",
    ),
    "a KL term where nothing would see it": (
        ["objective.name=raft", "kl.coef=0.1", "kl.placement=reward"],
        "kl.placement='reward': must be 'loss' with objective.name=raft, which accepts a response by its reward alone",
    ),
    "an adaptive KL from nothing": (
        ["kl.schedule=adaptive"],
        "kl.coef=0.0: must be greater than 0 with schedule=adaptive, which starts from it",
    ),
    "no room for a prompt": (
        ["rollout.max_new_tokens=64"],
        "rollout.max_new_tokens=64: must be less than model.max_context=64, which also holds the prompt",
    ),
    "a context longer than the positions": (
        ["model.max_context=1024"],
        "model.max_context=1024: must not exceed model.tiny.max_positions=512",
    ),
    "more updates than prompts": (
        ["learner.updates_per_batch=8", "rollout.prompts_per_step=4"],
        "learner.updates_per_batch=8: must not exceed rollout.prompts_per_step=4",
    ),
    "a group of one": (
        ["rollout.samples_per_prompt=1"],
        "rollout.samples_per_prompt=1: must be at least 2 with advantage.name=grpo, which compares responses to one "
        "prompt",
    ),
    "a batch of one": (
        ["advantage.name=batch_whiten", "rollout.samples_per_prompt=1", "rollout.prompts_per_step=1"],
        "rollout.samples_per_prompt=1: must be at least 2 with advantage.name=batch_whiten, which compares the "
        "responses of a batch",
    ),
    "an engine option that is ours to set": (
        ["rollout.engine_options.max_model_len=99"],
        "rollout.engine_options.max_model_len=99: set model.max_context instead",
    ),
    "code from a model's repository": (
        ["rollout.engine_options={trust_remote_code: true}"],
        "rollout.engine_options.trust_remote_code=true: must be left out: code that comes with a model is never run",
    ),
    "cached prefixes of old weights": (
        ["rollout.engine_options={enable_prefix_caching: true}"],
        "rollout.engine_options.enable_prefix_caching=true: must be left out unless reset_kv_on_update=true: "
        "cached prefixes outlive a weight update",
    ),
    "a secret": (
        ["rollout.engine_options={hf_token: hunter2}"],
        "rollout.engine_options.hf_token='***': must be left out: a run writes its configuration to disk; "
        "secrets belong in the environment",
    ),
}


@pytest.mark.parametrize(("overrides", "answer"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_answered_with_field_value_and_what_is_allowed(overrides: list[str], answer: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(SMALLEST, overrides)
    assert str(error.value) == f"configuration: 1 problem\n  {answer}"


@pytest.mark.parametrize(
    "overrides", [["objective.name=raft"], ["advantage.name=batch_whiten", "rollout.prompts_per_step=2"]]
)
def test_one_response_a_prompt_is_enough_where_it_has_no_need_of_others(overrides: list[str]) -> None:
    assert parse_config(SMALLEST, ["rollout.samples_per_prompt=1", *overrides]).rollout.samples_per_prompt == 1


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(SMALLEST, ["rollout.temperature=-1", "learner.lr=0", "kl.estimater=k3", "task.digits=none"])
    assert str(error.value).splitlines() == [
        "configuration: 4 problems",
        "  task.digits='none': must be a whole number",
        "  rollout.temperature=-1: must be greater than 0",
        "  kl.estimater='k3': unknown key; did you mean 'estimator'?",
        "  learner.lr=0: must be greater than 0",
    ]


def test_changing_the_task_by_its_name_alone_names_the_keys_left_over() -> None:
    data = {"task": {"name": "arithmetic", "digits": 3, "eval_size": 9}}
    with pytest.raises(ConfigError) as error:
        parse_config(data, ["task.name=jsonl", "task.path=x.jsonl"])
    (problem,) = str(error.value).splitlines()[1:]
    assert problem.startswith("  task.digits=3: a key of 'arithmetic', not of 'jsonl', which takes name, path, ")
    assert problem.endswith("to change the name, replace the whole section")


def test_a_key_that_is_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="rollout: the key 2 must be text"):
        parse_config({**SMALLEST, "rollout": {2: 3}})
    with pytest.raises(ConfigError, match="top level: the key 1 must be text"):
        parse_config({**SMALLEST, 1: 3})  # type: ignore[dict-item]


def test_a_long_value_is_cut_short() -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(SMALLEST, [f"kl.estimator={'k' * 500}"])
    assert max(map(len, str(error.value).splitlines())) < 160
