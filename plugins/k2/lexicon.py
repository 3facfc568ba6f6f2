"""How words are spelt in tokens, as a transducer for k2: tokens in, words out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from kdrecipe.interfaces import BLANK_ID, UNK_ID, TokenTable

from .arpa import Arc, unescape

Spelling = tuple[int, ...]


def spell(words: Iterable[str], tokens: TokenTable) -> dict[str, Spelling]:
    """The tokens of each word (as ARPA files write it); words that tokens can't spell are left out."""
    spellings = {word: tuple(tokens.encode(unescape(word))) for word in words}
    return {w: s for w, s in spellings.items() if s and not {BLANK_ID, UNK_ID} & set(s)}


def disambiguate(spellings: Mapping[str, Spelling], first_id: int) -> dict[str, Spelling]:
    """Spellings of which none is another one or the beginning of one, so that they can be distinguished.

    Where that is not so, one of the symbols ``#1``, ``#2``, ... is put behind (Mohri 2002): without
    them a transducer of words can't be made deterministic.

    Args:
        spellings: as :func:`spell` gives them.
        first_id: the id of ``#1``; the others follow.
    """
    beginnings = {s[:end] for s in spellings.values() for end in range(1, len(s))}
    shared = {s for s, count in Counter(spellings.values()).items() if count > 1}
    used: Counter[Spelling] = Counter()
    result = {}
    for word, spelling in spellings.items():
        if spelling in beginnings or spelling in shared:
            result[word] = (*spelling, first_id + used[spelling])
            used[spelling] += 1
        else:
            result[word] = spelling
    return result


def lexicon_arcs(
    spellings: Mapping[str, Spelling], word_ids: Mapping[str, int], backoff: tuple[int, int]
) -> list[Arc]:
    """Any sequence of words: state 0 is before and after each of them.

    Args:
        spellings: as :func:`disambiguate` gives them.
        word_ids: ids of the words, from 1 on.
        backoff: ``#0`` as a token and as a word, which may stand between words: the grammar backs off there.
    """
    arcs = [Arc(0, 0, backoff[0], word=backoff[1])]
    next_state = 1
    for word, spelling in spellings.items():
        here, output = 0, word_ids[word]
        for token in spelling[:-1]:
            arcs.append(Arc(here, next_state, token, word=output))
            here, output, next_state = next_state, 0, next_state + 1
        arcs.append(Arc(here, 0, spelling[-1], word=output))
    arcs.append(Arc(0, next_state, -1, word=-1))
    return arcs
