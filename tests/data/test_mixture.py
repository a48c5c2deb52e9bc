"""A mixture has its shares exactly, and sample s is the same whoever asks; folders that don't mix are refused."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loader import Loader
from data.mixture import MAX_PERIOD, Mixture, open_loader, open_tokens, shares
from data.prepare import ensure, prepare
from data.spec import DataSpec
from data.tokens import TokenSet

SEQ = 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_rows, jsonl, byte_level) -> list[str]:
    """Three texts of one tokenizer."""
    root = tmp_path_factory.mktemp("mixture")
    out = []
    for i, rows in enumerate((30, 12, 20)):
        file = jsonl(root / f"{i}.jsonl", make_rows(rows, first=100 * i))
        spec = DataSpec(files=str(file), tokenizer=str(byte_level), val_fraction=0.2, workers=1, name=f"t{i}")
        out.append(str(prepare(spec, root / "out")))
    return out


def test_portions_agree_and_every_folder_keeps_its_own_order(folders):
    mixture = Mixture(folders, [0.5, 0.3, 0.2])
    loader = open_loader(mixture, SEQ, 5, "stream")
    count = 3000  # several epochs of the smaller folders
    whole = loader.samples(0, count)
    other = open_loader(Mixture(folders, [0.5, 0.3, 0.2]), SEQ, 5, "stream")
    parts = [other.samples(i, min(7, count - i)) for i in range(0, count, 7)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(torch.cat([other.samples(i, 1) for i in (2999, 17, 0)]), whole[[2999, 17, 0]])
    found = loader.parts_of(0, count)
    assert np.bincount(found[:, 0]).tolist() == [1500, 900, 600]
    for part, folder in enumerate(folders):
        alone, mine = Loader(TokenSet(folder), "train", SEQ, 5), found[:, 0] == part
        order = np.argsort(found[mine, 1])
        assert found[mine, 1][order].tolist() == list(range(mine.sum()))
        assert torch.equal(whole[mine][order], alone.samples(0, int(mine.sum())))
    assert not torch.equal(open_loader(mixture, SEQ, 6, "stream").samples(0, 50), whole[:50])
    assert loader.sample_hashes(0, 5, 4) == [loader.sample_hashes(5 * i, 5, 1)[0] for i in range(4)]


def test_every_period_has_the_shares(folders):
    loader = open_loader(Mixture(folders, [0.5, 0.3, 0.2]), SEQ, 1, "stream")
    orders = set()
    for period in range(30):
        part = loader.parts_of(10 * period, 10)[:, 0]
        assert np.bincount(part).tolist() == [5, 3, 2]
        orders.add(tuple(part.tolist()))
    assert len(orders) > 20


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([0.5, 0.5], [1, 1]),
        ([0.7, 0.3], [7, 3]),
        ([0.125, 0.875], [1, 7]),
        ([1 / 3, 2 / 3], [1, 2]),
        ([0.70710678, 0.29289322], [7071, 2929]),
        ([0.0001, 0.9999], [1, 9999]),
    ],
)
def test_shares_are_as_exact_as_ten_thousand_samples_allow(weights, counts):
    assert shares(weights) == counts


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.4], r"add up to 0\.9; .*data\.weights=\[0\.555556,0\.444444\]"),
        ([2, 1], r"add up to 3; .*data\.weights=\[0\.666667,0\.333333\]"),
        ([1.5, -0.5], r"shares above 0"),
        ([1.0, 0.0], r"shares above 0"),
        ([0.99999, 0.00001], rf"a share must be at least {1 / MAX_PERIOD}"),
        ([float("nan"), 1], r"shares above 0"),
    ],
)
def test_weights_that_do_not_add_up_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        shares(weights)


def test_what_is_asked_names_the_mixture(folders):
    """The fingerprint, which names runs, follows texts, order and shares; the first one's val counts."""
    asked = [
        (folders[:2], [0.5, 0.5]),
        (folders[1::-1], [0.5, 0.5]),
        (folders[:2], [0.6, 0.4]),
        (folders[::2], [0.5, 0.5]),
        (folders, [0.5, 0.25, 0.25]),
    ]
    assert len({Mixture(*one).fingerprint for one in asked}) == 5
    mixture = Mixture(folders[:2], [0.25, 0.75])
    first, second = TokenSet(folders[0]), TokenSet(folders[1])
    assert mixture.split("val").length == first.split("val").length
    assert mixture.label == f"25 % {first.path.name} + 75 % {second.path.name}"
    lengths = first.split("train").length / 0.25, second.split("train").length / 0.75
    assert mixture.train_tokens == int(min(lengths))


def test_folders_that_do_not_mix_are_refused(folders, folder, tmp_path):
    with pytest.raises(ValueError, match=r"another tokenizer than .*data\.tokenizer=.*tokenizer\.json"):
        Mixture([folders[0], str(folder)], [0.5, 0.5])
    with pytest.raises(ValueError, match="the same text twice"):
        Mixture([folders[0], folders[0]], [0.5, 0.5])
    spec = DataSpec(mix=folders[:2], weights=[0.5, 0.5])
    assert ensure(spec, tmp_path) == Path(folders[0])
    assert isinstance(open_tokens(spec, folders[0]), Mixture)
    cases = {
        r"needs two token folders or more": {"mix": folders[:1], "weights": [1.0]},
        r"one number for each of the 2 folders": {"weights": [1.0]},
        r"data\.weights=None: needed is one number": {"weights": None},
        r"data\.weights is given without data\.mix": {"mix": None},
        r"data\.path is given beside data\.mix": {"path": folders[0]},
        r"data\.files is given beside data\.mix": {"files": "a.txt"},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(spec, **change).check()
    with pytest.raises(FileNotFoundError, match=r"data\.mix=.*nothing is no token folder"):
        ensure(dataclasses.replace(spec, mix=[folders[0], f"{tmp_path}/nothing"]), tmp_path)


def test_a_shard_of_any_folder_that_changes_is_noticed(folders, tmp_path):
    copy = Path(shutil.copytree(folders[1], tmp_path / "copy"))
    mixture = Mixture([folders[0], str(copy)], [0.5, 0.5])
    mixture.check_unchanged()
    with open(copy / "train-00000.bin", "r+b") as file:
        file.write(b"\xff\xff")
    with pytest.raises(RuntimeError, match=r"copy/train-00000\.bin was altered"):
        mixture.check_unchanged()


def test_overrides_give_the_mixture(folders):
    from launcher.compose import compose

    words = [f"data.mix=[{','.join(folders[:2])}]", "data.weights=[0.7,0.3]", "data=text"]
    spec = compose(words).config.data
    spec.check()
    assert open_tokens(spec, folders[0]).counts == [7, 3]
