"""The equations of predator-prey systems, and their integration by fixed steps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_MAX_SUBSTEP = 0.7  # longest Runge-Kutta step, time units: mean error 1e-5 over 100 steps of the data's systems

Field = Callable[[np.ndarray], np.ndarray]
"""The right-hand side of differential equations: states (dimensions, n) → their slopes (dimensions, n)."""


def predator_prey(parameters: np.ndarray) -> Field:
    """The equations of predator-prey systems: logistic prey, Holling II predator (Rosenzweig and MacArthur, 1963).

    ``x' = r x (1 - x/K) - a x y / (1 + h x)``,  ``y' = e a x y / (1 + h x) - d y``

    In ``ln x`` and ``ln y``, whose slopes these are, populations stay positive and the right-hand side is smooth. The classic
    system (Lotka, 1925; Volterra, 1926) has 1/K = 0 and h = 0.

    Parameters
    ----------
    parameters : array (6, n)
        Rows of r, K, a, h, e, d.

    Returns
    -------
    callable
        Logarithms of prey and predators (2, n) → their slopes (2, n).
    """
    r, capacity, a, h, e, d = parameters
    crowding, conversion = r / capacity, e * a

    def slope(logs: np.ndarray) -> np.ndarray:
        x, y = np.exp(logs)
        response = 1.0 / (1.0 + h * x)
        out = np.empty_like(logs)
        out[0] = r - crowding * x - a * y * response
        out[1] = conversion * x * response - d
        return out

    return slope


def runge_kutta_slopes(field: Field, state: np.ndarray, step: float | np.ndarray) -> tuple[np.ndarray, ...]:
    """The four slopes of a step of the classic Runge-Kutta method, of which it takes (k1 + 2 k2 + 2 k3 + k4) / 6.

    Who steps adds them up: in what order decides the last bits, which recorded forecasts and texts depend on.
    """
    k1 = field(state)
    k2 = field(state + (0.5 * step) * k1)
    k3 = field(state + (0.5 * step) * k2)
    k4 = field(state + step * k3)
    return k1, k2, k3, k4


def integrate(parameters: np.ndarray, start: np.ndarray, steps: int, dt: float) -> np.ndarray:
    """Integrate many systems of `predator_prey` at once by fixed-step Runge–Kutta 4 in log-populations.

    Parameters
    ----------
    parameters : array (6, m)
        Columns of r, K, a, h, e, d, all positive (h may be 0).
    start : array (2, m)
        Populations (prey, predator) at the first step, positive.
    steps : int
        Steps returned, the start included.
    dt : float
        Time between two steps; each is divided into equal substeps of at most 0.7 time units.

    Returns
    -------
    array (steps, 2, m), float64
    """
    slope = predator_prey(parameters)
    substeps = max(1, int(np.ceil(abs(dt) / _MAX_SUBSTEP)))
    step = dt / substeps

    logs = np.log(start)
    path = np.empty((steps, *logs.shape))
    path[0] = logs
    # Absurd trial parameters may overflow; the caller sees it as a value that is not finite.
    with np.errstate(all="ignore"):
        for index in range(1, steps):
            for _ in range(substeps):
                k1, k2, k3, k4 = runge_kutta_slopes(slope, logs, step)
                logs = logs + (step / 6.0) * (k1 + k4 + 2.0 * (k2 + k3))
            path[index] = logs
        return np.exp(path)
