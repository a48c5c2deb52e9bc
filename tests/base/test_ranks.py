"""Who this process is, by its launcher's variables: all of them, none, or a refusal."""

import pytest

from base import ranks
from base.ranks import Place, RanksError, place

SECOND = {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SECOND |= {"MASTER_ADDR": "node7", "MASTER_PORT": "29500"}


def test_one_of_several():
    assert place(SECOND) == Place(1, 4, 1, 2, ("node7", 29500))
    on_one_node = {name: value for name, value in SECOND.items() if name != "LOCAL_WORLD_SIZE"}
    assert place(on_one_node).local_world == 4


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": " ", "RANK": "", "LOCAL_RANK": ""},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        {"RANK": "0", "LOCAL_RANK": "0"},
        {"MASTER_ADDR": "node7", "MASTER_PORT": "any"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    ],
)
def test_one_process_alone(environment):
    assert place(environment) == Place()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"RANK": None}, "without RANK"),
        ({"RANK": "", "MASTER_ADDR": ""}, "without RANK, MASTER_ADDR"),
        ({"LOCAL_RANK": None}, "without LOCAL_RANK"),
        ({"MASTER_ADDR": None}, "without MASTER_ADDR"),
        ({"MASTER_PORT": None}, "without MASTER_PORT"),
        ({"WORLD_SIZE": None}, "no WORLD_SIZE"),
        ({"WORLD_SIZE": ""}, "no WORLD_SIZE"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is no"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is no"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE is no"),
        ({"WORLD_SIZE": "0"}, "1 or more"),
        ({"RANK": "$SLURM_PROCID"}, "RANK is no"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is no"),
        ({"RANK": "4"}, "RANK=4 .* WORLD_SIZE=4"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE=5"),
        ({"LOCAL_WORLD_SIZE": "0"}, "1 or more"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is a number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is a number"),
        ({"WORLD_SIZE": "1"}, "RANK=1"),
    ],
)
def test_half_of_them_is_refused_with_what_to_type(change, named):
    environment = SECOND | change
    with pytest.raises(RanksError, match=named) as caught:
        place({name: value for name, value in environment.items() if value is not None})
    assert "unset WORLD_SIZE RANK" in str(caught.value) and "torchrun" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_local_rank_alone_is_one_of_several():
    with pytest.raises(RanksError, match="LOCAL_RANK=3"):
        place({"LOCAL_RANK": "3"})


def test_what_starts_processes_itself_refuses_several(monkeypatch):
    for name, value in SECOND.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RanksError, match="run_grid"):
        ranks.refuse_several("run_grid.py")
    monkeypatch.setenv("WORLD_SIZE", "")
    with pytest.raises(RanksError, match="no WORLD_SIZE"):
        ranks.refuse_several("run_grid.py")
