"""How tests have programs compiled whose every digit counts."""
import os

SIXTEEN_DIGITS = {'xla_cpu_use_fusion_emitters': True} if 'fusion_emitters' in os.environ['XLA_FLAGS'] else None
"""Compiler options for float64: the older code for fusions, which conftest.py asks for, keeps eight digits in some."""
