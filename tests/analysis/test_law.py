import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic import non_finite, write_run

from analysis import law, published

SCRIPT = Path(__file__).parents[2] / "scripts" / "fit_scaling_law.py"
TRUE = law.Law(e=1.7, a=0.6, alpha=0.35, b=0.25, beta=0.4, gamma=0.8)
CELLS = [(int(n), int(n * ratio)) for n in (3e7, 5e7, 1e8, 2e8) for ratio in (25, 50, 100, 200, 400)]


def points(eff_n=1.0, eff_d=1.0, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    n, d = np.array(CELLS, dtype=float).T
    values = TRUE.loss(n, d, eff_n, eff_d) + noise * rng.normal(size=len(n))
    return dict(zip(CELLS, values.tolist(), strict=True))


def test_a_published_point_is_beside_a_run_of_its_size_and_length_alone():
    points = {(30_000_000, 750_000_000): 3.5}
    assert published.at(points, 30_200_000, 745_000_000) == 3.5
    assert published.at(points, 30_000_000, 740_000_000) is published.at(points, 30_500_000, 750_000_000) is None


def test_the_law_by_hand():
    # eff_N N = 1e8 and eff_D D = 1e10: (0.6 + 0.25)^0.8 + 1.7
    assert TRUE.loss(2e8, 5e9, 0.5, 2.0) == pytest.approx(1.7 + 0.85**0.8)


def test_a_known_law_and_known_factors_are_recovered():
    found = law.fit_law(points(), "coupled")
    assert law.rms(found, points()) < 1e-6
    n, d = 8e8, 4e10  # and it extrapolates: four times the largest size
    assert found.loss(n, d) == pytest.approx(TRUE.loss(n, d), abs=2e-4)
    factors = law.fit_factors(found, points(0.8, 0.93), points())
    assert (factors.eff_n, factors.eff_d) == pytest.approx((0.8, 0.93), abs=2e-3)


def test_an_offset_shared_by_all_recipes_does_not_leak_into_the_factors():
    shift = {cell: 0.01 * (cell[0] == CELLS[7][0]) for cell in CELLS}
    base = {cell: v + shift[cell] for cell, v in points().items()}
    quantized = {cell: v + shift[cell] for cell, v in points(0.8, 0.93).items()}
    factors = law.fit_factors(TRUE, quantized, base)
    assert (factors.eff_n, factors.eff_d) == pytest.approx((0.8, 0.93), abs=1e-3)


def test_a_size_that_is_off_shows_where_it_is_predicted_and_not_where_it_is_left_out():
    odd = CELLS[7][0]
    base = {cell: v + 0.01 * (cell[0] == odd) for cell, v in points().items()}
    left_out = runpy.run_path(str(SCRIPT))["leave_out"](TRUE, "coupled", base)
    assert left_out[odd] == {"rest": pytest.approx(0, abs=1e-6), "held_out": pytest.approx(0.01, rel=0.01)}
    assert min(left_out, key=lambda size: left_out[size]["rest"]) == odd


def test_jacobian_agrees_with_finite_differences():
    n, d = np.array(CELLS, dtype=float).T
    theta = law._theta(TRUE, "coupled")
    for i, column in enumerate(law._jacobian(theta, n, d).T):
        step = np.eye(6)[i] * 1e-6
        numeric = (law._law(theta + step).loss(n, d) - law._law(theta - step).loss(n, d)) / 2e-6
        assert column == pytest.approx(numeric, rel=1e-6, abs=1e-9)


def test_bootstrap_intervals_hold_the_truth_and_grow_with_the_noise():
    widths = []
    for noise in (1e-4, 1e-3):
        base, quantized = points(noise=noise), points(0.8, 0.93, noise, seed=1)
        fitted = law.fit_law(base, "coupled")
        _, drawn = law.bootstrap(fitted, "coupled", base, {"q": quantized}, draws=40)
        low, high = law.interval([f.eff_n for f in drawn["q"]])
        assert low - 0.01 < 0.8 < high + 0.01
        widths.append(high - low)
    assert widths[1] > 3 * widths[0]


def test_interval_is_the_central_95_percent_of_the_draws():
    assert law.interval(list(range(201))) == pytest.approx((5, 195))


@pytest.mark.parametrize(
    ("cells", "parameters", "factor"),
    [
        (8, 6, 2 * 4.302653 / 1.959964),  # sqrt(8 / 2), Student's t of 2 degrees of freedom over the normal quantile
        (12, 2, 1.2**0.5 * 2.228139 / 1.959964),  # sqrt(12 / 10), t of 10
    ],
)
def test_widened_residuals_by_hand(cells, parameters, factor):
    resid = np.resize([1.0, -1.0], cells)
    assert law.widened(resid, parameters) == pytest.approx(factor * resid, rel=1e-6)


@pytest.mark.parametrize("cells", [3, 20])
def test_bootstrap_intervals_of_a_factor_cover_the_truth(cells):
    """40 data sets of noise 1e-3: as many intervals as 95 % coverage gives in all but 1 % of cases (binomial: 34)."""
    chosen = [CELLS[i] for i in np.linspace(0, len(CELLS) - 1, cells).astype(int)]
    base, hits = points(), 0
    for trial in range(40):
        noisy = points(0.9, 0.95, 1e-3, seed=trial)
        quantized = {cell: noisy[cell] for cell in chosen}
        fitted = law.fit_factors(TRUE, quantized, base)
        rng = np.random.default_rng(trial)
        draws = [
            law.fit_factors(TRUE, *law._redraw(rng, TRUE, fitted, quantized, base), start=fitted) for _ in range(40)
        ]
        low, high = law.interval([draw.eff_n for draw in draws])
        hits += low <= 0.9 <= high
    assert hits >= 34


def test_too_little_to_fit_is_an_error_that_says_what_is_needed():
    few = dict(list(points().items())[:5])
    with pytest.raises(ValueError, match="8 cells over 2 sizes and 3 token counts; got 5 cells, 1 sizes"):
        law.fit_law(few)
    with pytest.raises(ValueError, match="got 8 cells, 4 sizes, 2 token counts"):
        law.fit_law({(n, d): 3.0 for n, _ in CELLS for d in (10**9, 10**10)})
    with pytest.raises(ValueError, match="three cells shared with the baseline, got 2"):
        law.fit_factors(TRUE, dict(list(few.items())[:2]), few)


def test_gap_power_law_is_recovered():
    base = points()
    quantized = {(n, d): v + 0.05 * (n / 1e8) ** -0.2 * (d / 1e10) ** 0.1 for (n, d), v in base.items()}
    found = law.fit_gap_power(quantized, base)
    assert (found.scale, found.n_power, found.d_power) == pytest.approx((0.05, -0.2, 0.1), abs=1e-4)


def test_published_file_is_read_whole_and_gives_the_published_means():
    recipes = published.load()
    assert len(recipes) == 34 and sum(map(len, recipes.values())) == 568  # 574 rows, 6 of them twice
    means = {name: 1e3 * np.mean(list(published.gaps(recipes[name], recipes["bf16"]).values())) for name in recipes}
    assert means["forward_1x16_46"] == pytest.approx(50.5, abs=0.05)
    assert means["backward_sr"] == pytest.approx(11.1, abs=0.05)
    assert recipes["bf16"][(30482560, 749993984)] == pytest.approx(3.4226, abs=5e-5)


@pytest.mark.parametrize(
    ("other", "low", "mean", "high", "misses"),
    [
        ("nvidia", 0.215, 0.274, 0.324, 0),
        ("nvidia_46", 0.190, 0.236, 0.272, 1),
        ("tetrajet2", 0.126, 0.179, 0.250, 14),
    ],
)
def test_where_the_claim_of_20_percent_holds(other, low, mean, high, misses):
    found = published.reduction(published.load(), "quartet2", other)
    assert found.summary() == pytest.approx((low, mean, high), abs=6e-4)
    assert (found.misses, len(found.cells)) == (misses, 21)


def test_coupled_form_fits_the_published_baseline_far_better_than_the_additive_one():
    base = published.load()["bf16"]
    fits = {form: law.fit_law(base, form) for form in law.FORMS}
    assert law.rms(fits["additive"], base) == pytest.approx(7.2e-3, rel=0.02)
    assert law.rms(fits["coupled"], base) == pytest.approx(3.45e-3, rel=0.02)
    rest = {cell: v for cell, v in base.items() if cell[0] != 49556736}
    assert law.rms(law.fit_law(rest, "coupled", fits["coupled"]), rest) < 1e-3


def test_a_cell_that_occurs_with_two_losses_is_an_error(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("size,N,D,scheme,variant,final_loss\n30M,1,2,bf16,-,3.0\n30M,1,2,bf16,-,3.1\n")
    with pytest.raises(ValueError, match=r"occurs with 3.0 and 3.1"):
        published.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"30M,1,2,bf16,-,3.0\n30", r"runs\.csv, line 3: N and D"),  # torn
        (b"30M,1,2,bf16,-,nan\n", r"runs\.csv, line 2: .* final_loss a finite one"),
        (b"30M,0,2,bf16,-,3.0\n", r"runs\.csv, line 2: N and D"),
        (b"30M,1,2,\xff\xfe,-,3.0\n", r"runs\.csv: can't be read as CSV"),
        (b"x" * 200_000, r"runs\.csv: can't be read as CSV"),
    ],
)
def test_a_file_that_can_not_be_read_is_one_error_that_names_it(tmp_path, text, message):
    path = tmp_path / "runs.csv"
    path.write_bytes(b"size,N,D,scheme,variant,final_loss\n" + text)
    with pytest.raises(ValueError, match=message):
        published.load(path)


@pytest.fixture
def our_runs(tmp_path):
    for recipe, eff_n in (("bf16", 1.0), ("quartet2", 0.8)):
        for i, n in enumerate((3e7, 1e8, 2e8)):
            for j, steps in enumerate((1000, 4000, 16000)):
                loss = float(TRUE.loss(n, steps * 262144, eff_n))
                write_run(
                    tmp_path / "runs", recipe, 0, loss, name=f"{recipe}-{i}-{j}", parameters_non_embedding=int(n),
                    steps=steps, tokens_per_step=262144,
                )  # fmt: skip
    return f"{tmp_path}/runs/*"


def test_command_line_fits_our_own_runs(our_runs, tmp_path):
    command = [sys.executable, str(SCRIPT), our_runs, "--fit", "ours", "--draws", "5"]
    done = subprocess.run([*command, "--out", str(tmp_path / "law")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "law" / "law.json").read_text())
    assert found["factors"]["quartet2"]["eff_n"] == pytest.approx(0.8, abs=0.01)
    assert "| quartet2 | 9 |" in (tmp_path / "law" / "law.md").read_text()
    assert (tmp_path / "law" / "law.png").read_bytes()[:4] == b"\x89PNG"


def test_without_the_published_runs_ours_are_fitted_or_it_is_said_what_they_are(
    our_runs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(published, "DEFAULT_PATH", tmp_path / "nowhere.csv")
    main = runpy.run_path(str(SCRIPT))["main"]
    monkeypatch.setattr("sys.argv", ["", our_runs, "--draws", "5", "--out", str(tmp_path / "law")])
    assert main() == 0 and "Scaling law of our runs" in capsys.readouterr().out
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "law").iterdir()}
    with monkeypatch.context() as killed_before_the_rename:
        killed_before_the_rename.setattr("os.replace", lambda *_: None)
        assert main() == 0
    assert len(before) == 3 and before == {file: file.stat().st_mtime_ns for file in before}
    monkeypatch.setattr("sys.argv", ["", "--out", str(tmp_path / "law")])
    assert main() == 2
    message = capsys.readouterr().err
    assert "--published FILE" in message and "results/published" in message


def our_points(root):
    return runpy.run_path(str(SCRIPT))["our_points"]([f"{root}/*"])


def test_points_are_means_over_seeds_without_nudged_and_diverged_runs(tmp_path):
    write_run(tmp_path, "bf16", 0, 3.0)
    write_run(tmp_path, "bf16", 1, 3.2)
    write_run(tmp_path, "bf16", 0, 9.0, numerics={"rounding_seed": 1001}, name="nudged")
    write_run(tmp_path, "sr", 0, 3.3)
    non_finite(write_run(tmp_path, "sr", 1, 9.0, steps_done=60), 61)
    write_run(tmp_path, "fp8", 0, 9.0, steps_done=60)
    assert our_points(tmp_path) == {"bf16": {(3_000_000, 102_400): pytest.approx(3.1)}}


def test_gaps_are_over_the_seeds_that_both_have_as_in_the_comparison(tmp_path):
    for recipe, losses in {"bf16": (3.0, 3.2), "sr": (3.1, 3.3, 3.9), "fp8": (3.1,)}.items():
        for seed, loss in enumerate(losses):
            write_run(tmp_path, recipe, seed, loss)
    write_run(tmp_path, "nvidia", 7, 3.4)
    (bf16,), (sr,), (fp8,), (nvidia,) = (our_points(tmp_path)[r].values() for r in ("bf16", "sr", "fp8", "nvidia"))
    assert (bf16, sr - bf16, fp8 - bf16) == pytest.approx((3.1, 0.1, 0.1))
    assert nvidia == pytest.approx(3.4)  # no seed in common: by the means


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numerics": {"optim.lr": 2e-3}}, r"bf16 \(optim.lr=0.001\), bf16 \(optim.lr=0.002\)"),
        ({"data_fingerprint": "x"}, "data differs"),
        ({"steps": 50, "tokens_per_step": 2048}, "batch"),
    ],
)
def test_runs_that_make_no_one_point_are_refused(tmp_path, change, message):
    write_run(tmp_path, "bf16", 0, 3.0)
    write_run(tmp_path, "bf16", 1, 2.9, name="other", **change)
    with pytest.raises(ValueError, match=message):
        our_points(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_fingerprint": "x"}, "a law needs runs of like text: data differs: .*x in large"),
        ({"tokenizer_hash": "x"}, "tokenizer differs"),
        ({"vocab_size": 7}, "vocabulary differs"),
        ({"seq_len": 64}, "sequence length differs"),
        ({"rows_seed": 8}, "large and .*small, step 100: .*not the same validation tokens"),
    ],
)
def test_all_cells_of_a_law_are_of_like_text(tmp_path, change, message):
    """Another corpus for one size gave other parameters without a word; so did other validation text."""
    write_run(tmp_path, "bf16", 0, 3.0, name="small")
    write_run(tmp_path, "bf16", 0, 2.9, name="large", parameters_non_embedding=10**8, **change)
    with pytest.raises(ValueError, match=message):
        our_points(tmp_path)


def test_a_batch_of_its_own_for_each_size_is_like_text(tmp_path):
    write_run(tmp_path, "bf16", 0, 3.0, name="small")
    write_run(tmp_path, "bf16", 0, 2.9, name="large", parameters_non_embedding=10**8, tokens_per_step=2048)
    assert len(our_points(tmp_path)["bf16"]) == 2


def test_losses_on_our_text_are_not_drawn_among_published_ones():
    from analysis import law_plots

    fitted, factors = {"q": law.Factors(0.8, 0.93, 0.0, 20)}, {"q": ((0.7, 0.9), (0.9, 1.0))}
    ours = {"bf16": {CELLS[7]: 2.0}, "q": {CELLS[7]: 2.1}}
    figure = law_plots.figure(TRUE, points(), {"q": points(0.8)}, fitted, factors, ours)
    stars = [ax for ax in figure.axes if any(line.get_marker() == "*" for line in ax.lines)]
    assert len(stars) == 1 and "gap" in stars[0].get_title(loc="left")
