"""An export is the checkpoint's model and nothing else, or a clear refusal."""

import pytest
from safetensors.torch import load_file

from rlsys.errors import CheckpointError, ConfigError
from rlsys.learning.export import export
from rlsys.learning.tiny import make_tiny


@pytest.fixture
def checkpoint(tmp_path, tiny_config):
    directory = tmp_path / "step-000001"
    make_tiny(tiny_config(), "0123456789=", directory, seed=0)
    (directory / "trainer").mkdir()
    return directory


def test_an_export_is_the_model_cast_and_without_the_trainer(checkpoint, tmp_path):
    target = export(checkpoint, tmp_path / "out", "bfloat16")
    before, after = (load_file(path / "model.safetensors") for path in (checkpoint, target))
    assert not (target / "trainer").exists()
    assert (target / "tokenizer.json").is_file()
    assert before.keys() == after.keys()
    assert all((after[name] == tensor.bfloat16()).all() for name, tensor in before.items())


def test_an_export_that_cannot_be_is_refused_and_writes_nothing(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="holds no model"):
        export(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ConfigError, match="dtype=int4: allowed are float32, bfloat16, float16"):
        export(checkpoint, tmp_path / "out", "int4")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="exists already"):
        export(checkpoint, checkpoint)
