"""Tuning: layouts of weights chosen by measurement on the machine that will run them.

:mod:`~sparse_tvm.tuning.records` keeps what was measured and answers for the compiler,
:mod:`~sparse_tvm.tuning.tuner` decides what to measure next, :mod:`~sparse_tvm.tuning.measuring`
has it measured in another process (:mod:`~sparse_tvm.tuning.worker`), and
:mod:`~sparse_tvm.tuning.fitting` fits a target's cost parameters to it.
"""
