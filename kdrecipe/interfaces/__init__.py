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
    Bounds,
    BundleLike,
    Exporter,
    Runner,
    Runtime,
    RuntimeSearch,
    Speller,
    Variant,
)
from kdrecipe.interfaces.losses import (
    GivenTargets,
    Loss,
    LossOutput,
    LossSetup,
    Progress,
    call_loss,
)
from kdrecipe.interfaces.models import (
    Architecture,
    Head,
    ModelInfo,
    Tap,
    taps_of,
)
from kdrecipe.interfaces.recognition import (
    Decoder,
    Hypothesis,
    LanguageModel,
    Metric,
    TokenTable,
)
from kdrecipe.interfaces.structure import (
    UNIT_KINDS,
    Part,
    UnitGroup,
    UnitKind,
)
from kdrecipe.interfaces.targets import (
    ALIGNABLE_KINDS,
    CODEBOOK_SIZE,
    FORCED_KINDS,
    FRAME_KINDS,
    TAP_KINDS,
    TEXT_KINDS,
    VOCABULARY_KINDS,
    Align,
    Codes,
    Hidden,
    LatticePosteriors,
    NBest,
    Posteriors,
    TargetItem,
    TargetKind,
    Targets,
    TargetSpec,
    whole_factor,
)
from kdrecipe.interfaces.teachers import Spelling, Teacher, TokenTeacher

__all__ = [
    "ALIGNABLE_KINDS",
    "BLANK_ID",
    "CODEBOOK_SIZE",
    "FORCED_KINDS",
    "FRAME_KINDS",
    "FRAME_SAMPLES",
    "SAMPLE_RATE",
    "SOS_EOS_ID",
    "TAP_KINDS",
    "TEXT_KINDS",
    "UNIT_KINDS",
    "UNK_ID",
    "VOCABULARY_KINDS",
    "Align",
    "Architecture",
    "Batch",
    "Bounds",
    "BundleLike",
    "Codes",
    "CompressContext",
    "Compressor",
    "Corpus",
    "Decoder",
    "Exporter",
    "GivenTargets",
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
    "NBest",
    "Options",
    "Part",
    "Piece",
    "Posteriors",
    "Prepared",
    "Progress",
    "Runner",
    "Runtime",
    "RuntimeSearch",
    "Speller",
    "Spelling",
    "Tap",
    "TargetItem",
    "TargetKind",
    "TargetSpec",
    "Targets",
    "Teacher",
    "TokenTable",
    "TokenTeacher",
    "UnitGroup",
    "UnitKind",
    "Variant",
    "call_loss",
    "float_copy",
    "taps_of",
    "whole_factor",
]
