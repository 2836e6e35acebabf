"""Where a text takes back something it has just said: the sign of reflection that R1-Zero reports to appear under RL.

The markers are a subset of the reflective words that the R1 paper counts (arXiv 2501.12948, appendix on the emergence
of reflection), without those that are common in plain prose, such as "but" and "however".
"""

from __future__ import annotations

import re

CORRECTION_MARKERS = ("wait", "mistake", "retry", "recheck", "let me check", "that is wrong", "on second thought")

_MARKER_PATTERN = re.compile(r"\b(?:" + "|".join(map(re.escape, CORRECTION_MARKERS)) + r")\b", re.IGNORECASE)


def corrects_itself(text: str) -> bool:
    """Whether the text holds a correction marker as a whole word, in any case.

    It says that the text claims to correct itself, not that the correction is right: compare the accuracy of outputs
    with and without it. `corrects_itself("4+3=8\\nwait 4+3=7")` is true; `corrects_itself("a waiter")` is false.
    """
    return _MARKER_PATTERN.search(text) is not None
