"""The impure half: carries out a plan. No policy here; only this room and `methods`, `kernels` import torch."""
