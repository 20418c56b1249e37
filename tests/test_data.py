"""Data: the shipped file, the simulator, the split, and every refusal of the loaders."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from m2helpers import data, simulator
from m2helpers.data import load_dataset, split, summary
from m2helpers.files import UserError
from m2helpers.series import read_series
from m2helpers.simulator import SimulatorSettings, simulate, write_dataset

# tolerances on the statistics, in the order of data.STATISTICS: mean, sd, 1 %, quartiles, 99 %, max
TOLERANCES = np.array([0.10, 0.10, 0.25, 0.10, 0.10, 0.10, 0.25, 0.40])


@pytest.fixture(scope="module")
def shipped():
    return load_dataset()


# ---------------------------------------------------------------- the shipped file and the simulator


def test_shipped_file_has_the_schema(shipped):
    assert shipped.trajectories.shape == (1000, 100, 2) and shipped.trajectories.dtype == np.float32
    assert shipped.time.dtype == np.float64
    np.testing.assert_allclose(shipped.time, np.linspace(0, 200, 100))


def test_shipped_file_matches_the_course_statistics(shipped):
    change = (summary(shipped.trajectories) / data.COURSE_STATISTICS - 1).abs().to_numpy()
    assert (change <= TOLERANCES).all(), change.round(3)
    train = shipped.part("train").astype(float)
    assert np.percentile(shipped.trajectories.astype(float), 99.7) == pytest.approx(data.COURSE_P997, rel=0.05)
    assert np.percentile(train, 99.7) == pytest.approx(data.COURSE_P997_TRAIN, rel=0.05)
    assert 0.005 <= (shipped.trajectories[:, -1, 1] < data.FADING_BELOW).mean() <= 0.03


def test_simulator_reproduces_the_shipped_file(shipped):
    time, trajectories, _ = simulate(SimulatorSettings())
    np.testing.assert_allclose(trajectories, shipped.trajectories, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(time, shipped.time)
    few = simulate(SimulatorSettings(systems=5))[1]  # the first systems do not depend on the number of systems
    np.testing.assert_allclose(few, shipped.trajectories[:5], rtol=1e-4, atol=1e-6)
    assert not np.allclose(simulate(SimulatorSettings(systems=5, seed=1))[1], few)


def test_shipped_file_carries_its_settings():
    defaults = SimulatorSettings()
    with h5py.File(data.DATA_FILE, "r") as file:
        assert set(file.attrs) == set(vars(defaults))
        for name, value in vars(defaults).items():
            assert np.array_equal(file.attrs[name], value), name


def test_trajectories_obey_the_equations():
    """The slope of a finely sampled solution equals the right-hand side written out from the design."""
    time, trajectories, parameters = simulate(SimulatorSettings(systems=3, steps=20001, t_max=20.0))
    slope = np.gradient(trajectories.astype(float), time, axis=1)[:, 50:-50:50]
    x, y = np.moveaxis(trajectories.astype(float), 2, 0)[:, :, 50:-50:50]
    r, K, a, h, e, d, _, _ = (column[:, None] for column in parameters.to_numpy().T)
    np.testing.assert_allclose(slope[..., 0], r * x * (1 - x / K) - a * x * y / (1 + h * x), atol=1e-3)
    np.testing.assert_allclose(slope[..., 1], e * a * x * y / (1 + h * x) - d * y, atol=1e-3)
    np.testing.assert_allclose(trajectories[:, 0], parameters[["x0", "y0"]], rtol=1e-6)


def test_classic_system_conserves_its_quantity_and_the_other_does_not():
    def spread(classic):
        """Range over time of e a x - d ln x + a y - r ln y, which classic orbits conserve; (systems,)."""
        _, trajectories, parameters = simulate(SimulatorSettings(systems=20, classic=classic))
        x, y = np.moveaxis(trajectories.astype(float), 2, 0)
        r, _, a, _, e, d, _, _ = (column[:, None] for column in parameters.to_numpy().T)
        return np.ptp(e * a * x - d * np.log(x) + a * y - r * np.log(y), axis=1)

    assert spread(classic=True).max() < 1e-5
    assert spread(classic=False).min() > 1e-3


def test_parameters_stay_in_their_ranges_and_are_correlated_as_stated():
    settings = SimulatorSettings(systems=5000)
    parameters = simulator.draw_parameters(settings)
    for name in simulator.PARAMETERS:
        low, high = getattr(settings, name)
        assert low <= parameters[name].min() and parameters[name].max() <= high, name
        assert parameters[name].mean() == pytest.approx((low + high) / 2, rel=0.02), name
    ranks = parameters.corr("spearman")
    # Spearman's correlation of a Gaussian copula is 6/pi arcsin(rho/2)
    for pair in (("r", "a"), ("e", "d"), ("a", "h")):
        rho = getattr(settings, "correlation_{}_{}".format(*pair))
        assert ranks.loc[pair] == pytest.approx(6 / np.pi * np.arcsin(rho / 2), abs=0.04), pair
    assert abs(ranks.loc["K", "d"]) < 0.05


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match="systems 0: must be at least 1"):
        SimulatorSettings(systems=0)
    with pytest.raises(UserError, match="seed -1: must be at least 0"):
        SimulatorSettings(seed=-1)


# ---------------------------------------------------------------- split, statistics, datasheet


def test_split_is_the_published_one(shipped):
    parts = split(1000)
    assert [len(parts[name]) for name in ("train", "validation", "test")] == [800, 100, 100]
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(1000))
    # scikit-learn shuffles with the legacy generator and takes the held-out part first
    order = np.random.RandomState(42).permutation(1000)
    np.testing.assert_array_equal(parts["train"], order[200:])
    rest = order[:200][np.random.RandomState(42).permutation(200)]
    np.testing.assert_array_equal(parts["test"], rest[:100])
    np.testing.assert_array_equal(parts["validation"], rest[100:])
    np.testing.assert_array_equal(shipped.part("test"), shipped.trajectories[parts["test"]])
    assert not np.array_equal(split(1000, seed=1)["test"], parts["test"])
    with pytest.raises(UserError, match="'tests': no such part; use one of train, validation, test"):
        shipped.part("tests")


def test_split_of_the_smallest_dataset_has_no_empty_part():
    assert [len(part) for part in split(10).values()] == [8, 1, 1]


def test_summary_of_known_values():
    prey = np.arange(101.0)
    table = summary(np.stack([prey, 2 * prey], axis=1)[np.newaxis])
    expected = [50, np.sqrt((101**2 - 1) / 12), 1, 25, 50, 75, 99, 100]
    np.testing.assert_allclose(table.loc["prey"], expected)
    np.testing.assert_allclose(table.loc["predator"], 2 * np.array(expected))


def test_datasheet_shows_the_shipped_statistics(shipped):
    text = (Path(data.DATA_FILE).parent / "README.md").read_text(encoding="utf-8")
    block = text.split("<!-- begin: data-statistics -->")[1].split("<!-- end: data-statistics -->")[0]
    assert block.strip() == data.statistics_table(shipped)


def test_datasheet_shows_the_ranges_and_correlations():
    text = (Path(data.DATA_FILE).parent / "README.md").read_text(encoding="utf-8")
    for name, value in vars(SimulatorSettings()).items():
        if isinstance(value, tuple):
            assert f"| `{name}` | {value[0]:g} – {value[1]:g} |" in text, name
        elif name.startswith("correlation"):
            assert f"| `{name}` | {value:g} |".replace("-", "−") in text, name


# ---------------------------------------------------------------- writing and loading


def _good(n=12, steps=6):
    rng = np.random.default_rng(0)
    return {"trajectories": rng.random((n, steps, 2)).astype(np.float32), "time": np.linspace(0, 10, steps)}


def _write(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values
    return path


def test_write_then_load_gives_the_same_values_and_bytes(tmp_path):
    settings = SimulatorSettings(systems=12, steps=7)
    time, trajectories, _ = simulate(settings)
    for name in ("one.h5", "two.h5"):
        write_dataset(tmp_path / name, time, trajectories, settings)
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()
    loaded = load_dataset(tmp_path / "one.h5")
    np.testing.assert_array_equal(loaded.trajectories, trajectories)
    np.testing.assert_array_equal(loaded.time, time)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["one.h5", "two.h5"]


def test_hash_is_over_the_content(tmp_path):
    good = _good()
    original = load_dataset(_write(tmp_path / "a.h5", **good)).sha256
    wider = good | {"trajectories": good["trajectories"].astype(">f8"), "note": np.zeros(3)}
    assert load_dataset(_write(tmp_path / "b.h5", **wider)).sha256 == original
    changed = good["trajectories"].copy()
    changed[3, 2, 1] += 1e-3
    assert load_dataset(_write(tmp_path / "c.h5", **good | {"trajectories": changed})).sha256 != original


def test_loading_does_not_touch_the_file(tmp_path):
    path = _write(tmp_path / "a.h5", **_good())
    before, stamp = path.read_bytes(), path.stat().st_mtime_ns
    loaded = load_dataset(path)
    loaded.trajectories[:] = 0
    read_series(path)
    assert path.read_bytes() == before and path.stat().st_mtime_ns == stamp
    assert list(tmp_path.iterdir()) == [path]


def test_float32_time_counts_as_even(tmp_path):
    good = _good(steps=100)
    good["time"] = np.linspace(0, 200, 100, dtype=np.float32)
    assert load_dataset(_write(tmp_path / "a.h5", **good)).time.dtype == np.float64


@pytest.mark.parametrize("late", [1, -1])
def test_a_time_may_be_off_by_a_ten_thousandth_of_a_step(late, tmp_path):
    """What rounding to float32 does passes; what an observer's clock does is refused."""
    time = np.arange(6) * 2.0
    time[5] += late * 0.9e-4 * 2
    load_dataset(_write(tmp_path / "even.h5", **_good() | {"time": time}))
    time[5] += late * 0.2e-4 * 2
    with pytest.raises(UserError, match=r"uneven time axis, from step 4 .* by (2\.00022|1\.99978) .* by 2;"):
        load_dataset(_write(tmp_path / "uneven.h5", **_good() | {"time": time}))


def _with(value, where=(3, 4, 1)):
    trajectories = _good()["trajectories"].astype(np.float64)
    trajectories[where] = value
    return {"trajectories": trajectories}


REFUSALS = {
    "no trajectories": ({"trajectories": None}, r"no dataset /trajectories, only \['time'\]; add it"),
    "no time": ({"time": None}, r"no dataset /time, only \['trajectories'\]; add it"),
    "rank of trajectories": ({"trajectories": np.ones((12, 6))}, r"/trajectories has shape \(12, 6\).*rank 3"),
    "rank of time": ({"time": np.ones((6, 1))}, r"/time has shape \(6, 1\).*rank 1"),
    "scalar": ({"trajectories": 1.0}, r"/trajectories has shape \(\).*rank 3"),
    "last axis": ({"trajectories": np.ones((12, 6, 3))}, r"last axis of /trajectories is 3; it must be 2"),
    "kind": ({"trajectories": np.full((12, 6, 2), b"1.0")}, r"/trajectories holds \|S3; it must hold real numbers"),
    "lengths": ({"time": np.arange(7.0)}, r"/trajectories has 6 steps, /time 7; they must agree"),
    "one step": ({"trajectories": np.ones((12, 1, 2)), "time": np.zeros(1)}, r"has 1 steps.*2 or more"),
    "too few": ({"trajectories": np.ones((9, 6, 2))}, r"9 trajectories; add more, the split needs 10"),
    "NaN": (_with(np.nan), r"trajectory 3, step 4, variable 1 is nan .*must be finite"),
    "infinity": (_with(-np.inf), r"trajectory 3, step 4, variable 1 is -inf .*must be finite"),
    "too large": (_with(1e300), r"trajectory 3, step 4, variable 1 is inf .*must be finite"),
    "negative": (_with(-0.25, (11, 0, 0)), r"trajectory 11, step 0, variable 0 is -0.25 .*cannot be negative"),
    "uneven time": ({"time": np.array([0, 2, 4, 6.5, 8, 10])}, r"uneven time axis, from step 2 .* by 2.5 .* by 2;"),
    "NaN in time": ({"time": np.array([0, 2, np.nan, 6, 8, 10])}, r"uneven time axis, from step 1 .* by nan"),
    "falling time": ({"time": np.linspace(10, 0, 6)}, r"uneven time axis.*rising times"),
    "constant time": ({"time": np.zeros(6)}, r"uneven time axis.*rising times"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_load_dataset_refuses(case, tmp_path):
    changes, message = REFUSALS[case]
    datasets = {name: values for name, values in (_good() | changes).items() if values is not None}
    path = _write(tmp_path / "bad.h5", **datasets)
    with pytest.raises(UserError, match=message) as caught:
        load_dataset(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_load_dataset_refuses_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"absent.h5: no such file; check the name, or make one"):
        load_dataset(tmp_path / "absent.h5")
    (tmp_path / "text.h5").write_text("prey,predator\n1,2\n")
    with pytest.raises(UserError, match=r"text.h5: cannot be read as HDF5 .*signature.*; restore it"):
        load_dataset(tmp_path / "text.h5")
    whole = _write(tmp_path / "whole.h5", **_good()).read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut.h5: cannot be read as HDF5 .*truncated.*; restore it"):
        load_dataset(tmp_path / "cut.h5")
    with pytest.raises(UserError, match=r"no such file"):
        load_dataset(tmp_path)
    with h5py.File(tmp_path / "damaged.h5", "w") as file:
        file.create_dataset("trajectories", data=np.zeros((12, 6, 2)), compression="gzip")
        file["time"] = np.arange(6.0)
        block = file["trajectories"].id.get_chunk_info(0).byte_offset
    damaged = bytearray((tmp_path / "damaged.h5").read_bytes())
    damaged[block : block + 8] = b"\xff" * 8  # opens well, fails when the block is read
    (tmp_path / "damaged.h5").write_bytes(damaged)
    with pytest.raises(UserError, match=r"damaged.h5: cannot be read as HDF5 .*; restore it"):
        load_dataset(tmp_path / "damaged.h5")
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file.create_group("trajectories")
    with pytest.raises(UserError, match=r"no dataset /trajectories"):
        load_dataset(tmp_path / "group.h5")
