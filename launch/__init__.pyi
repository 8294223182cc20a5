from .cli import main as main
from .config import load_config as load_config
