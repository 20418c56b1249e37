from .distribution import Distribution as Distribution
from .generation import Forecast as Forecast
from .generation import Generated as Generated
from .generation import Options as Options
from .generation import SamplingOptions as SamplingOptions
from .generation import forecast as forecast
from .generation import generate as generate
from .generation import sample_forecasts as sample_forecasts
