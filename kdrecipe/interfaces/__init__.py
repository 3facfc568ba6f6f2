"""The interface between plugins and the core: data classes and small Protocols.

Plugins build on this package, :mod:`kdrecipe.errors`, :mod:`kdrecipe.layers` and
:mod:`kdrecipe.data` only. It imports neither torch nor lhotse, which are slow to import.

Shapes, in names and docstrings: B utterances, S audio samples, F feature bins, T frames (of the
features, or of the encoder after subsampling), U tokens, V vocabulary, D width, K kept classes; of
a transducer: J width of the joiner, and P = U + 1 positions between tokens.
"""

from kdrecipe.interfaces.batches import (
    Batch,
    Lattice,
    ModelOutput,
    Piece,
)
from kdrecipe.interfaces.common import (
    BLANK_ID,
    FRAME_SAMPLES,
    SAMPLE_RATE,
    SOS_EOS_ID,
    UNK_ID,
    Located,
    Options,
)
from kdrecipe.interfaces.compression import (
    CompressContext,
    Compressor,
    float_copy,
)
from kdrecipe.interfaces.corpora import (
    Corpus,
    Prepared,
)
from kdrecipe.interfaces.exports import (
    BundleLike,
    Exporter,
    Runner,
    Runtime,
    RuntimeSearch,
    Speller,
)
from kdrecipe.interfaces.losses import (
    Loss,
    LossOutput,
    LossSetup,
)
from kdrecipe.interfaces.models import (
    Architecture,
    Head,
    ModelInfo,
    tap_shifts_s,
)
from kdrecipe.interfaces.recognition import (
    Decoder,
    Hypothesis,
    LanguageModel,
    Metric,
    TokenTable,
)
from kdrecipe.interfaces.targets import (
    ALIGNABLE_KINDS,
    FORCED_KINDS,
    FRAME_KINDS,
    VOCABULARY_KINDS,
    Align,
    Hidden,
    LatticePosteriors,
    Posteriors,
    TargetKind,
    Targets,
    TargetSpec,
    whole_factor,
)
from kdrecipe.interfaces.teachers import Spelling, Teacher, TokenTeacher

__all__ = [
    "ALIGNABLE_KINDS",
    "BLANK_ID",
    "FORCED_KINDS",
    "FRAME_KINDS",
    "FRAME_SAMPLES",
    "SAMPLE_RATE",
    "SOS_EOS_ID",
    "UNK_ID",
    "VOCABULARY_KINDS",
    "Align",
    "Architecture",
    "Batch",
    "BundleLike",
    "CompressContext",
    "Compressor",
    "Corpus",
    "Decoder",
    "Exporter",
    "Head",
    "Hidden",
    "Hypothesis",
    "LanguageModel",
    "Lattice",
    "LatticePosteriors",
    "Located",
    "Loss",
    "LossOutput",
    "LossSetup",
    "Metric",
    "ModelInfo",
    "ModelOutput",
    "Options",
    "Piece",
    "Posteriors",
    "Prepared",
    "Runner",
    "Runtime",
    "RuntimeSearch",
    "Speller",
    "Spelling",
    "TargetKind",
    "TargetSpec",
    "Targets",
    "Teacher",
    "TokenTable",
    "TokenTeacher",
    "float_copy",
    "tap_shifts_s",
    "whole_factor",
]
