"""A rank that was started otherwise than rank 0 is named before any work."""

import re
from dataclasses import replace

import pytest
import torch

from launcher.compose import compose
from training.ranks import alike
from training.ranks.distributed import Dist


class Fake(Dist):
    """Rank 0 of two: what each gathers is its own and then `other`'s."""

    def gather(self, value):
        return [value, self.__dict__["other"](value)]


def ranks(other) -> Dist:
    found = Fake(0, 2, 0, torch.device("cpu"), group="gloo")
    found.__dict__["other"] = other
    return found


def changed(**values):
    return lambda own: {"host": "b", "values": own["values"] | values}


@pytest.fixture(scope="module")
def config():
    return compose(["model=llama_tiny", "data=pydocs"]).config


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", "1"), ("checkpoint.every", "7"), ("quant.fprop.w.grid", "e4m3"), ("code", "0"), ("torch", "2.0")],
)
def test_a_rank_with_another_command_or_commit_is_named(config, name, value):
    with pytest.raises(
        ValueError, match=rf"rank 1 on b .*rank 0 .*{re.escape(name)}={value} against .*commit"
    ) as caught:
        alike.check_start(ranks(changed(**{name: value})), config)
    assert "\n" not in str(caught.value)


def test_what_is_alike_passes_and_places_may_differ(config):
    alike.check_start(ranks(lambda own: own), config)
    elsewhere = replace(config, paths=replace(config.paths, data="/scratch/b"))
    assert alike.told(elsewhere) == alike.told(config) != alike.told(replace(config, seed=1))


def test_one_process_compares_nothing(config, monkeypatch):
    monkeypatch.setattr(alike, "code", lambda: 1 / 0)
    alike.check_start(Dist(0, 1, 0, torch.device("cpu")), config)


def test_edited_code_has_another_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(alike, "ROOT", tmp_path)
    (tmp_path / "quant").mkdir()
    found = set()
    for text in ("a = 1", "a = 2"):
        (tmp_path / "quant" / "mine.py").write_text(text)
        found.add(alike.code())
    assert len(found) == 2
