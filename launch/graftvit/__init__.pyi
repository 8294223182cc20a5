from .checkpoints.export import export as export
from .checkpoints.pretrained import load as load
from .checkpoints.pretrained import load_pretrained as load_pretrained
from .checkpoints.student import save as save
from .models.conversion import convert as convert
from .models.given import as_model as as_model
from .transfer.align import Alignment as Alignment
from .transfer.analysis.layer_maps import attention_maps as attention_maps
from .transfer.analysis.visualize.visualize import visualize as visualize
from .transfer.config import RunConfig as RunConfig
from .transfer.deploy import deploy as deploy
from .transfer.engine.train import train as train
from .transfer.methods.dual import DualViT as DualViT
from .transfer.methods.mismatch import compare_models as compare_models
from .transfer.metrics.measure import evaluate as evaluate
from .transfer.push import push as push

__version__: str
