"""Language models: load a checkpoint folder and generate text; the models and tokenizers are mlx-lm's."""

from qgraph.lm.architecture import known_types as known_types
from qgraph.lm.generate import LanguageModel as LanguageModel
from qgraph.lm.generate import load as load
from qgraph.lm.sampling import Piece as Piece
from qgraph.lm.sampling import Stats as Stats
