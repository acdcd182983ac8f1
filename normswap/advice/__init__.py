"""Which norm, and why: a table of rules on what the model is and what the user does with it; and measurements."""

from normswap.advice.compare import Comparison, compare
from normswap.advice.recommend import Recommendation, recommend
from normswap.advice.situation import Situation

__all__ = ["Comparison", "Recommendation", "Situation", "compare", "recommend"]
