from .checkpoints.pretrained import load as load
from .checkpoints.pretrained import load_pretrained as load_pretrained
from .checkpoints.student import save_student as save_student
from .models.conversion import convert as convert
from .transfer.config import RunConfig as RunConfig
from .transfer.engine.train import train as train
from .transfer.methods.dual import DualViT as DualViT

__version__: str
