from .run import TrainResult as TrainResult
from .run import train_lora as train_lora
from .steps import Training as Training
from .steps import TrainRow as TrainRow
from .steps import TrainState as TrainState
from .steps import series_loss as series_loss
