"""The simulator that made the shipped file: predator-prey systems with parameters drawn at random."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

import h5py
import numpy as np
import pandas as pd
from scipy.integrate import solve_ivp
from scipy.stats import norm

from ..files import UserError, atomic_path
from ..settings import check_least
from .equations import predator_prey

PARAMETERS = ("r", "K", "a", "h", "e", "d", "x0", "y0")
_TOLERANCE = 1e-9  # of the integrator, relative and absolute, on the logarithms of the populations


@dataclass(frozen=True)
class SimulatorSettings:
    """Everything that decides a simulated dataset; the defaults are those of the shipped file.

    Each pair is the range (low, high) of a uniform draw, one draw per system. The draws are independent
    except for the three pairs at the end, which are tied by a Gaussian copula with the given correlation.
    """

    systems: int = 1000  # number of trajectories
    steps: int = 100  # observations per trajectory, evenly spaced from 0 to t_max
    t_max: float = 200.0  # time of the last observation
    seed: int = 42  # of the parameter draw
    classic: bool = False  # classic Lotka-Volterra: K -> infinity and h -> 0, so that orbits never damp
    r: tuple[float, float] = (0.105, 0.295)  # growth rate of the prey, per unit of time
    K: tuple[float, float] = (5.0, 16.0)  # carrying capacity of the prey
    a: tuple[float, float] = (0.21, 0.49)  # attack rate of the predator
    h: tuple[float, float] = (0.0, 0.18)  # saturation of the predator (Holling II: attack rate x handling time)
    e: tuple[float, float] = (0.30, 0.70)  # predators gained per prey eaten
    d: tuple[float, float] = (0.11, 0.31)  # death rate of the predator, per unit of time
    x0: tuple[float, float] = (0.8, 1.2)  # prey at time 0
    y0: tuple[float, float] = (0.8, 1.2)  # predators at time 0
    correlation_r_a: float = -0.5  # fast breeders are attacked less
    correlation_e_d: float = -0.5  # efficient predators live longer
    correlation_a_h: float = -0.2  # eager attackers saturate less

    def __post_init__(self) -> None:
        check_least(self, dict(systems=1, steps=2, seed=0))
        if not 0 < self.t_max < np.inf:
            raise UserError(f"t_max {self.t_max}: must be positive and finite")


def draw_parameters(settings: SimulatorSettings) -> pd.DataFrame:
    """Draw the parameters of every system, one row a system, columns `PARAMETERS`.

    Correlated standard normals are turned into uniforms by the normal distribution function (a Gaussian copula)
    and stretched to the ranges. The first rows do not depend on how many systems are asked for.
    """
    correlation = pd.DataFrame(np.eye(len(PARAMETERS)), index=PARAMETERS, columns=PARAMETERS)
    for first, second in (("r", "a"), ("e", "d"), ("a", "h")):
        value = getattr(settings, f"correlation_{first}_{second}")
        correlation.loc[first, second] = correlation.loc[second, first] = value
    normals = np.random.default_rng(settings.seed).standard_normal((settings.systems, len(PARAMETERS)))
    uniforms = norm.cdf(normals @ np.linalg.cholesky(correlation.to_numpy()).T)
    low, high = np.array([getattr(settings, name) for name in PARAMETERS]).T
    parameters = pd.DataFrame(low + (high - low) * uniforms, columns=PARAMETERS)
    if settings.classic:
        parameters["K"], parameters["h"] = np.inf, 0.0
    return parameters


def simulate(settings: SimulatorSettings) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Simulate systems of `predator_prey` with parameters drawn at random (`draw_parameters`).

    Returns
    -------
    time : float64 array (steps,)
    trajectories : float32 array (systems, steps, 2)
        Prey first, then predator.
    parameters : DataFrame (systems, 8)
        Columns `PARAMETERS`.
    """
    parameters = draw_parameters(settings)
    time = np.linspace(0.0, settings.t_max, settings.steps)
    return time, solve(parameters.to_numpy(), time), parameters


def solve(parameters: np.ndarray, time: np.ndarray) -> np.ndarray:
    """The series of systems of `predator_prey`, float32 (n, steps, 2).

    All are integrated together, as one stacked equation, by the eighth-order Runge-Kutta method of Dormand and Prince.

    Parameters
    ----------
    parameters : array (n, 8)
        Columns `PARAMETERS`.
    time : array (steps,)
        From 0 on.

    Raises
    ------
    UserError
        If the integration fails.
    """
    values = parameters.T
    field = predator_prey(values[:6])

    def slopes(_time: float, state: np.ndarray) -> np.ndarray:
        return field(state.reshape(2, -1)).ravel()

    start = np.log(values[6:].ravel())
    solution = solve_ivp(slopes, (0.0, time[-1]), start, "DOP853", time, rtol=_TOLERANCE, atol=_TOLERANCE)
    if not solution.success:
        raise UserError(f"simulation failed ({solution.message}); use parameter ranges nearer to the defaults")
    logarithms = solution.y.reshape(2, len(parameters), len(time))  # (variables, systems, steps)
    return np.exp(logarithms).transpose(1, 2, 0).astype(np.float32)


def write_dataset(
    path: str | os.PathLike, time: np.ndarray, trajectories: np.ndarray, settings: SimulatorSettings
) -> None:
    """Write `/time` and `/trajectories` as HDF5, all of it or nothing, with the settings as the file's attributes.

    The same input gives the same bytes: no time of writing is stored.
    """
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("trajectories", data=np.asarray(trajectories, np.float32), track_times=False)
        file.create_dataset("time", data=np.asarray(time, np.float64), track_times=False)
        for name, value in asdict(settings).items():
            file.attrs[name] = value
