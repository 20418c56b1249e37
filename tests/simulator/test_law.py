"""The law of a dataset: fits that find the parameters again, draws spread like them, and one record that ships."""

import numpy as np
import pytest
from scipy.stats import ks_2samp, spearmanr

from m2helpers.data import Dataset, load_dataset
from m2helpers.files import UserError
from m2helpers.paths import SHIPPED_LAWS
from m2helpers.simulator import Law, SimulatorSettings, fit_law, law_of, load_law, simulate
from m2helpers.simulator.fits import ACCEPTED, fit_systems


def _dataset(trajectories, dt=2.0):
    return Dataset("made.h5", dt * np.arange(trajectories.shape[1]), trajectories.astype(np.float32), "0" * 64)


def test_fits_find_the_parameters_that_the_simulator_drew():
    time, trajectories, drawn = simulate(SimulatorSettings(systems=8, seed=3))
    found, costs = fit_systems(trajectories, time[1])
    assert (costs < ACCEPTED).all()
    np.testing.assert_allclose(found, drawn, rtol=2e-3, atol=2e-4)


@pytest.mark.slow
def test_data_of_another_law_are_refused():
    noise = np.exp(np.random.default_rng(0).normal(0, 0.3, (20, 12, 2)))
    with pytest.raises(UserError, match=r"made\.h5: the predator-prey equations fit 0 of 16 training series"):
        fit_law(_dataset(noise))


def test_draws_are_spread_and_tied_like_what_was_fitted(tmp_path):
    drawn = simulate(SimulatorSettings(systems=500, steps=2, seed=1))[2].to_numpy()
    law = Law(drawn, 2.0, 100, {"split": "train"})
    systems = law.draw(4000, 7)
    assert all(ks_2samp(a, b).pvalue > 0.01 for a, b in zip(systems.T, drawn.T, strict=True))
    np.testing.assert_allclose(spearmanr(systems)[0], spearmanr(drawn)[0], atol=0.06)
    assert (systems >= 0).all() and len(np.unique(systems[:, 0])) == 4000  # none is a copy
    np.testing.assert_array_equal(law.draw(3, [7, 1]), law.draw(3, [7, 1]))
    law.save(tmp_path / "law.json")
    again = load_law(tmp_path / "law.json")
    assert again.sha256 == law.sha256 and again.about == law.about
    (tmp_path / "law.json").write_text("{}")
    with pytest.raises(UserError, match="holds no fitted law"):
        load_law(tmp_path / "law.json")


def test_the_shipped_law_is_that_of_the_shipped_training_split():
    dataset = load_dataset()
    law = load_law(SHIPPED_LAWS / f"{dataset.sha256[:16]}.json")
    assert law.about["data_sha256"] == dataset.sha256 and (law.about["split"], law.about["fitted"]) == ("train", 799)
    assert law.sha256 == law_of(dataset).sha256
    starts = dataset.part("train")[:, 0]  # (800, 2)
    away = np.abs(law.parameters[:, None, 6:] - starts).max(axis=2).min(axis=1)
    assert away.max() < 1e-6  # every system is one of the training split, and of no other


@pytest.mark.slow
def test_the_shipped_law_can_be_fitted_again():
    dataset = load_dataset()
    law = law_of(dataset)
    np.testing.assert_allclose(fit_law(dataset).parameters, law.parameters, rtol=2e-3, atol=1e-4)
