from .run import PretrainSettings as PretrainSettings
from .run import mixture_loss as mixture_loss
from .run import pretrain as pretrain
