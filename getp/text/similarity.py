"""How similar texts are to references where they need not be equal: chrF and ROUGE-L."""

from collections.abc import Sequence
from dataclasses import dataclass

INSTALL = "pip install 'getp[eval]'"
"""The command that installs the packages which compute the measures."""


@dataclass(frozen=True)
class Similarity:
    """Measures of similarity, from 0 to 1, where 1 is equality."""

    chrf: float  # F2 of character n-grams up to 6, over all texts (Popović 2015), by sacrebleu
    rouge_l: float  # mean F1 of the longest common subsequence of words (Lin 2004), by rouge-score


def similarity(texts: Sequence[str], references: Sequence[str]) -> Similarity | None:
    """Return how similar each text is to its reference; None without the packages or any text."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import CHRF
    except ImportError:
        return None
    if not texts:
        return None
    if list(texts) == list(references):  # also texts that are all empty, for which chrF is 0
        return Similarity(1.0, 1.0)
    chrf = CHRF().corpus_score(list(texts), [list(references)]).score / 100
    scorer = RougeScorer(["rougeL"])
    each = [
        1.0 if text == other else scorer.score(other, text)["rougeL"].fmeasure
        for text, other in zip(texts, references, strict=True)
    ]
    return Similarity(chrf, sum(each) / len(each))
