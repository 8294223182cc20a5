from .cli import main as main
from .load_config import load_config as load_config
