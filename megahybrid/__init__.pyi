from megahybrid.api import Tokenizer as Tokenizer
from megahybrid.api import evaluate as evaluate
from megahybrid.api import export as export
from megahybrid.api import generate as generate
from megahybrid.api import load_model as load_model
from megahybrid.api import load_run as load_run
from megahybrid.api import train as train
from megahybrid.data.dataset import TokenDataset as TokenDataset

__version__: str
__all__: list[str]
