"""What docs/cluster.md tells people to type is what the command line and the configuration take."""

import re
import shlex
from itertools import takewhile
from pathlib import Path

import pytest
import typer

from rlsys.cli import app
from rlsys.config import load_config

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "cluster.md"


def typed(*programs: str) -> list[list[str]]:
    """The words of every line of the page's shell blocks that starts one of these programs."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line.removesuffix("&"), comments=True) for line in lines]
    return [list(takewhile(lambda word: word != "|", words)) for words in commands if words and words[0] in programs]


RLSYS = [words[1:] for words in typed("rlsys", "scripts/run")]
SLURM = typed("sbatch")


@pytest.mark.parametrize("words", RLSYS, ids=" ".join)
def test_a_command_is_one_that_rlsys_takes(words: list[str]) -> None:
    name, *rest = words
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    given = command.make_context(name, list(rest)).params
    if given.get("config"):
        load_config(ROOT / given["config"], given["overrides"] or ())


@pytest.mark.parametrize("words", SLURM, ids=" ".join)
def test_a_slurm_job_is_given_a_run(words: list[str]) -> None:
    script = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
    assert (ROOT / words[script]).is_file()
    load_config(ROOT / words[script + 1], words[script + 2 :])


def test_the_page_was_read() -> None:
    assert {words[0] for words in RLSYS} == {"train", "up", "submit", "status", "logs", "scale", "stop", "down"}
    assert len(SLURM) == 1


def test_the_page_links_to_what_is_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", PAGE.read_text())
    assert len(links) > 10
    for link in links:
        assert (PAGE.parent / link).exists(), link
