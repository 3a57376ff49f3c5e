"""A checkpoint is whole or it does not exist, and resuming from one changes no bit of what follows."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlsys.errors import CheckpointError
from rlsys.learning import checkpoint
from rlsys.learning.checkpoint import latest, load, prune, save, write_atomically
from tests.unit.learning.samples import make_batch, parameters


def trained(make_learner, path, batches: int = 2, **options):
    learner = make_learner(path=path, **options)
    for seed in range(batches):
        learner.update(make_batch(seed, version=learner.version))
    return learner


def extra_of(directory: Path) -> dict:
    return json.loads((directory / "trainer" / "state.json").read_text())["extra"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("fixture", ["tiny", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_update_after_a_resume_is_the_one_that_would_have_been(make_learner, tmp_path, request, fixture, dtype):
    path = request.getfixturevalue(fixture)
    options = {
        "model": {"dtype": dtype},
        "learner": {"updates_per_batch": 2, "warmup_steps": 4},
        "kl": {"coef": 0.1, "placement": "reward", "schedule": "adaptive", "target": 0.01, "horizon": 24},
    }
    reference = [0.1 - r.behavior_logprobs * 0 - 2 for g in make_batch(9) for r in g.group.rollouts]
    learner = make_learner(path=path, **options)
    for version in range(2):
        learner.update(make_batch(9, version=version), reference)
    save(tmp_path / "step", learner, tokenizer_from=path)
    resumed = make_learner(path=tmp_path / "step", **options)
    resumed.load_state(load(tmp_path / "step"))
    assert resumed.version == 2
    assert same(parameters(resumed), parameters(learner))
    metrics = [one.update(make_batch(9, version=2), reference).step.metrics for one in (learner, resumed)]
    assert metrics[0] == metrics[1]
    assert metrics[0]["kl/coef"] != 0.1, "the adaptive coefficient has moved and is part of the state"
    assert same(parameters(resumed), parameters(learner))
    forgetful = make_learner(path=tmp_path / "step", **options)
    forgetful.update(make_batch(9, version=0), reference)
    assert not same(parameters(forgetful), parameters(learner)), "parameters alone are not the learner"


@pytest.mark.parametrize("fixture", ["tiny", "untied"])
def test_plain_transformers_loads_what_was_saved(make_learner, tmp_path, request, fixture):
    path = request.getfixturevalue(fixture)
    learner = trained(make_learner, path)
    directory = save(tmp_path / "step", learner, tokenizer_from=path)
    model = AutoModelForCausalLM.from_pretrained(directory)
    for name, tensor in learner.named_tensors():
        assert torch.equal(model.state_dict()[name], tensor), name
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied == (fixture == "tiny")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.encode("12+7=") == AutoTokenizer.from_pretrained(path).encode("12+7=") == [3, 4, 12, 9, 13]
    assert GenerationConfig.from_pretrained(directory).eos_token_id == tokenizer.eos_token_id == 1
    assert not list(directory.rglob("*.bin")) + list(directory.rglob("*.pt")), "no pickles"


def test_what_the_caller_adds_comes_back(make_learner, tiny, tmp_path):
    extra = {"source": {"epoch": 1, "cursor": 7}, "open": [[0, 3], [0, 5]]}
    save(tmp_path / "step", trained(make_learner, tiny), tokenizer_from=tiny, extra=extra)
    assert extra_of(tmp_path / "step") == extra
    state = load(tmp_path / "step")
    assert (state.version, state.seed) == (2, 0)


def test_interrupted_writes_are_ignored_and_the_previous_checkpoint_loads(make_learner, tiny, tmp_path, monkeypatch):
    parent = tmp_path / "checkpoints"
    first = save(parent / "step-1", trained(make_learner, tiny, 1), tokenizer_from=tiny)
    shutil.copytree(first, parent / ".step-3.abcd1234.partial")
    (parent / "step-4").mkdir()
    (parent / "note.txt").write_text("not a checkpoint")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(CheckpointError, match=r"step-2 could not be written: .*No space left"):
        save(parent / "step-2", trained(make_learner, tiny, 2), tokenizer_from=tiny)
    assert not (parent / "step-2").exists()
    assert not list(parent.glob(".step-2*")), "nothing is left behind"
    assert latest(tmp_path) == first
    assert load(first).version == 1


def test_a_write_killed_at_any_moment_leaves_the_old_or_the_new_checkpoint(make_learner, tiny, tmp_path, monkeypatch):
    """Replacing a directory takes two renames; a kill between them leaves the old one aside, still found."""
    parent = tmp_path / "checkpoints"
    learner = trained(make_learner, tiny, 1)
    directory = save(parent / "step-1", learner, tokenizer_from=tiny, extra={"n": 1})
    renames = []
    plain = type(directory).rename

    def killed_at_the_second(self, target):
        renames.append(self.name)
        if len(renames) == 2:
            raise KeyboardInterrupt
        return plain(self, target)

    monkeypatch.setattr(type(directory), "rename", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        save(directory, learner, tokenizer_from=tiny, extra={"n": 2})
    monkeypatch.undo()
    assert not directory.exists()
    survivor = latest(tmp_path)
    assert survivor is not None
    assert load(survivor).version == 1
    assert extra_of(survivor) == {"n": 1}
    save(directory, learner, tokenizer_from=tiny, extra={"n": 3})
    assert latest(tmp_path) == directory
    assert extra_of(directory) == {"n": 3}
    assert [p.name for p in parent.iterdir()] == ["step-1"]


@pytest.mark.parametrize("name", ["model.safetensors", "trainer/optimizer.safetensors", "tokenizer.json"])
def test_damage_is_noticed_before_a_run_continues_from_it(make_learner, tiny, tmp_path, name):
    directory = save(tmp_path / "step", trained(make_learner, tiny, 1), tokenizer_from=tiny)
    whole = (directory / name).read_bytes()
    (directory / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=rf"damaged: {name} has {len(whole) // 2} bytes, not {len(whole)}"):
        load(directory)
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=rf"damaged: {name} is missing"):
        load(directory)


def test_what_is_no_checkpoint_says_so(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load(tiny)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load(tmp_path / "nowhere")
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        load(tmp_path)
    (tmp_path / "trainer" / "state.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        load(tmp_path)
    assert latest(tmp_path / "nowhere") is None


def test_the_newest_is_the_highest_version_and_pruning_keeps_the_newest(make_learner, tiny, tmp_path):
    parent = tmp_path / "checkpoints"
    learner = make_learner()
    for version in range(1, 4):
        learner.update(make_batch(version))
        save(parent / f"{'cab'[version - 1]}", learner, tokenizer_from=tiny)
    (parent / ".a.0000.partial").mkdir()
    assert latest(tmp_path) == parent / "b"
    prune(tmp_path, keep=2)
    assert sorted(p.name for p in parent.iterdir()) == ["a", "b"]
    assert prune(tmp_path, keep=5) == []


def test_atomic_writing_without_replacement_keeps_what_is_there(tmp_path):
    write_atomically(tmp_path / "d", lambda d: (d / "f").write_text("one"))
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "d", lambda d: (d / "f").write_text("two"), replace=False)
    assert (tmp_path / "d" / "f").read_text() == "one"
    write_atomically(tmp_path / "d", lambda d: (d / "g").write_text("three"))
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["g"]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_values_that_are_not_json_are_refused(make_learner, tiny, tmp_path):
    for value in (float("nan"), object()):
        with pytest.raises(CheckpointError, match="could not be written"):
            save(tmp_path / "step", make_learner(), tokenizer_from=tiny, extra={"x": value})
    assert list(tmp_path.iterdir()) == []
