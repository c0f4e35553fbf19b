"""What is known of a model's inputs from use: the file that `quantconvert observe` writes, read without torch."""

from quantconvert.statistics.fit import check_fit, check_weights, fingerprint
from quantconvert.statistics.reader import KINDS, OBSERVE, Statistics, open_statistics

__all__ = ["KINDS", "OBSERVE", "Statistics", "check_fit", "check_weights", "fingerprint", "open_statistics"]
