"""Computed figures in pages: tables between markers, numbers in sentences that are found by their words."""

import importlib.util

import pytest

from analysis import pages
from base.commands import ROOT


def test_a_marked_table_is_replaced_and_the_rest_stays():
    text = "before\n<!-- table: t -->\n| old |\n<!-- end -->\nafter\n"
    table = pages.table(["a", "b"], [["1", ""]])
    assert table == "| a | b |\n| --- | --- |\n| 1 | |\n"
    assert pages.blocks(text, {"t": lambda: table}) == f"before\n<!-- table: t -->\n{table}<!-- end -->\nafter\n"
    with pytest.raises(pages.PageError, match="'t'; there are: other"):
        pages.blocks(text, {"other": str})


@pytest.mark.parametrize(
    ("text", "wanted", "new"),
    [
        ("It gains 9.9 +-\n2.5 e-3.", "gains 10.0 +- 2.3 e-3.", "It gains 10.0 +-\n2.3 e-3."),
        ("only to 7.0e-3, a tenth", "only to 7.2e-3", "only to 7.2e-3, a tenth"),
        ("| `a` | any words 7 | -1.0 |", "| `a` | ... | +35.4 |", "| `a` | any words 7 | +35.4 |"),
        ("1,024 tokens, sd .0012", "65,536 tokens, sd .0020", "65,536 tokens, sd .0020"),
    ],
)
def test_numbers_of_a_sentence_are_replaced_where_its_words_are(text, wanted, new):
    assert pages.sentence(text, wanted) == new
    assert pages.sentence(new, wanted) == new


@pytest.mark.parametrize("text", ["nothing of it", "gains 1 e-3. And gains 2 e-3."])
def test_words_that_are_not_in_one_place_are_an_error(text):
    with pytest.raises(pages.PageError, match="places, not one, have the words of: gains 3 e-3"):
        pages.sentence(text, "gains 3 e-3")


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("results_script", ROOT / "scripts" / "check" / "results.py")
    module = importlib.util.module_from_spec(spec)
    __import__("sys").modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_every_page_says_what_the_raw_runs_say(results):
    """`make results` mends what this names."""
    wrong = []
    for page, wanted in results.sentences().items():
        wrong += [f"{page}:{line}" for line in pages.differences(*results.computed(page, wanted))]
    assert not wrong, "\n".join(wrong)


def test_every_marked_table_is_in_a_page_that_is_checked(results):
    marked = {page for page in (ROOT / "docs").rglob("*.md") if pages.BLOCK.search(page.read_text())}
    assert marked <= {ROOT / page for page in results.sentences()}
    found = [name for page in marked for _, name, *_ in pages.BLOCK.findall(page.read_text())]
    assert sorted(found) == sorted(results.TABLES)


def test_check_names_a_wrong_number_and_changes_nothing(results, monkeypatch, capsys, tmp_path):
    page = "docs/results/README.md"
    (tmp_path / "docs" / "results").mkdir(parents=True)
    text = (ROOT / page).read_text().replace("quartet2 33e-3 above", "quartet2 23e-3 above")
    (tmp_path / page).write_text(text)
    monkeypatch.setattr(results, "sentences", lambda only=results.sentences(): {page: only[page]})
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["results.py", "--check"])
    assert results.main() == 1
    assert "23e-3" in (shown := capsys.readouterr().out) and "-> - [Ranking" in shown
    assert (tmp_path / page).read_text() == text
