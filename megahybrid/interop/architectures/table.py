"""The classes that a model is exported as and imported from. A new one is its file and a line."""

from collections.abc import Sequence

from megahybrid.config.architecture_fit import Fit
from megahybrid.config.layer_plan import LayerPlan
from megahybrid.config.model import ModelConfig
from megahybrid.errors import InteropError
from megahybrid.interop.architectures.afmoe import Afmoe
from megahybrid.interop.architectures.base import Architecture
from megahybrid.interop.architectures.cohere import Cohere
from megahybrid.interop.architectures.cohere2 import Cohere2
from megahybrid.interop.architectures.cohere_compass import CohereCompass
from megahybrid.interop.architectures.exaone4 import Exaone4
from megahybrid.interop.architectures.exaone_moe import ExaoneMoe
from megahybrid.interop.architectures.flint import Flint
from megahybrid.interop.architectures.gemma3 import Gemma3
from megahybrid.interop.architectures.granite_swa import GraniteSWA
from megahybrid.interop.architectures.llama import Llama
from megahybrid.interop.architectures.llama4 import Llama4
from megahybrid.interop.architectures.megahybrid import Megahybrid
from megahybrid.interop.architectures.mellum import Mellum
from megahybrid.interop.architectures.ministral3 import Ministral3
from megahybrid.interop.architectures.mistral import Mistral
from megahybrid.interop.architectures.olmo2 import Olmo2
from megahybrid.interop.architectures.olmo3 import Olmo3
from megahybrid.interop.architectures.qwen2 import Qwen2
from megahybrid.interop.architectures.qwen3 import Qwen3
from megahybrid.interop.architectures.smollm3 import SmolLM3

Table = Sequence[Architecture]

ARCHITECTURES: Table = (
    Cohere2(),
    Cohere(),
    CohereCompass(),
    SmolLM3(),
    Llama(),
    Mistral(),
    Ministral3(),
    Qwen2(),
    Qwen3(),
    ExaoneMoe(),
    Mellum(),
    GraniteSWA(),
    Flint(),
    Exaone4(),
    Olmo2(),
    Olmo3(),
    Afmoe(),
    Gemma3(),
    Llama4(),
    Megahybrid(),
)


def huggingface_fits(
    model: ModelConfig, plan: LayerPlan | None = None, table: Table = ARCHITECTURES
) -> list[Fit]:
    """Return one Fit per class that transformers ships, those that support the model first."""
    plan = plan or model.layer_plan
    fits = [architecture.fit(model, plan) for architecture in table if not architecture.code_files]
    return sorted(fits, key=lambda fit: not fit.can)


def by_name(name: str, table: Table = ARCHITECTURES) -> Architecture:
    """Return the class of that name."""
    return next(architecture for architecture in table if architecture.name == name)


def of_model_type(model_type: str, table: Table = ARCHITECTURES) -> Architecture:
    """Return the class that a config.json names. Raises InteropError for one that cannot be
    imported."""
    known = {a.model_type: a for a in table if not a.code_files}
    if model_type not in known:
        raise InteropError(
            f"model_type={model_type} is none that can be imported ({', '.join(sorted(known))})."
        )
    return known[model_type]
