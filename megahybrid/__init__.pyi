from megahybrid.api import Picture as Picture
from megahybrid.api import Tokenizer as Tokenizer
from megahybrid.api import analyse as analyse
from megahybrid.api import draw_heads as draw_heads
from megahybrid.api import evaluate as evaluate
from megahybrid.api import export as export
from megahybrid.api import generate as generate
from megahybrid.api import load_model as load_model
from megahybrid.api import load_run as load_run
from megahybrid.api import tokenize as tokenize
from megahybrid.api import train as train
from megahybrid.api import train_tokenizer as train_tokenizer
from megahybrid.data.dataset import TokenDataset as TokenDataset

__version__: str
__all__: list[str]
