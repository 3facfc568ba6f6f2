"""The decoding graph HLG: CTC's topology, lexicon and grammar in one transducer (Miao 2015).

In the order of icefall's recipes: lexicon and grammar are composed, made deterministic, freed of
the symbols that were there for that purpose, and composed with CTC's topology.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdrecipe.errors import DataError
from kdrecipe.interfaces import TokenTable

from .arpa import Arc, grammar_arcs, read_arpa, unescape, vocabulary
from .lexicon import disambiguate, lexicon_arcs, spell


@dataclass(frozen=True)
class Graph:
    """A decoding graph.

    Args:
        fsa: ``k2.Fsa``, sorted by arcs; ``labels`` are what the frames say, blanks included,
            ``tokens`` are 0 but where a token starts, and ``aux_labels`` are ids of words.
        words: the word of each id; empty for a graph without words.
    """

    fsa: Any
    words: Sequence[str] = ()


def ctc_topology(k2: Any, num_tokens: int) -> Graph:
    """CTC's rule alone: any sequence of tokens, repeats merged unless a blank is between them."""
    fsa = k2.arc_sort(k2.ctc_topo(num_tokens - 1, modified=False))
    fsa.tokens = fsa.aux_labels
    return Graph(fsa)


def compile_hlg(k2: Any, arpa: Path, tokens: TokenTable, lm_weight: float) -> Graph:
    """The graph of all sentences of a word n-gram.

    Args:
        k2: the module.
        arpa: the n-gram over words; each sentence scores ``lm_weight`` times its log-probability.
        tokens: of the model; words that they can't spell do not occur.
        lm_weight: 0 or more; 0 leaves of the n-gram its words.

    Raises:
        DataError: the file is missing or wrong, or none of its words can be spelt.
    """
    ngrams = read_arpa(arpa)
    spellings = spell(vocabulary(ngrams), tokens)
    if not spellings:
        raise DataError(
            "none of the n-gram's words can be spelt in the model's tokens",
            where=str(arpa),
            remedy="estimate the n-gram from text of the model's own language and spelling",
        )
    ids = {word: number for number, word in enumerate(spellings, start=1)}
    backoff = (len(tokens), len(ids) + 1)  # the symbol #0, as a token and as a word
    spellings = disambiguate(spellings, first_id=backoff[0] + 1)
    lexicon = _fsa(k2, lexicon_arcs(spellings, ids, backoff), transducer=True)
    grammar = _fsa(k2, grammar_arcs(ngrams, ids, backoff[1], lm_weight))
    lexicon_grammar = k2.connect(k2.compose(k2.arc_sort(lexicon), k2.arc_sort(grammar)))
    lexicon_grammar = _without_symbols(k2, k2.connect(k2.determinize(lexicon_grammar)), backoff)
    topology = k2.ctc_topo(len(tokens) - 1, modified=False)
    fsa = k2.compose(topology, k2.arc_sort(lexicon_grammar), inner_labels="tokens")
    return Graph(k2.arc_sort(k2.connect(fsa)), ["", *map(unescape, ids)])


def word_ids(fsa: Any) -> Tensor:
    """All ``aux_labels`` in the order of the arcs: one of each, or where k2 merged arcs any number."""
    labels = fsa.aux_labels
    return labels if isinstance(labels, Tensor) else labels.values


def _without_symbols(k2: Any, fsa: Any, backoff: tuple[int, int]) -> Any:
    """``#0`` and the lexicon's ``#1``, ... as epsilons, and these removed."""
    labels = fsa.labels
    labels[labels >= backoff[0]] = 0
    fsa.labels = labels  # assigned, so that k2 looks again at what it knows of the arcs
    word_ids(fsa)[word_ids(fsa) >= backoff[1]] = 0
    fsa = k2.connect(k2.remove_epsilon(fsa))
    if not isinstance(fsa.aux_labels, Tensor):
        fsa.aux_labels = fsa.aux_labels.remove_values_eq(0)
    return fsa


def _fsa(k2: Any, arcs: Sequence[Arc], *, transducer: bool = False) -> Any:
    """``k2.Fsa`` of arcs in any order; with ``transducer`` their words are its output."""
    arcs = sorted(arcs, key=lambda arc: arc.source)
    table_A3 = torch.tensor([arc[:3] for arc in arcs], dtype=torch.int32)
    scores_A = torch.tensor([arc.score for arc in arcs], dtype=torch.float32)
    words_A = torch.tensor([arc.word for arc in arcs], dtype=torch.int32) if transducer else None
    # k2 takes the bits of a score in a column of integers
    return k2.Fsa(torch.cat([table_A3, scores_A.view(torch.int32)[:, None]], dim=1), words_A)
