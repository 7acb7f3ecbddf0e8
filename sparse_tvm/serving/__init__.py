"""Serve compiled models over the Open Inference Protocol: ``sparse-tvm serve``.

A request's way: :mod:`~sparse_tvm.serving.rest` or :mod:`~sparse_tvm.serving.rpc` decode it
(:mod:`~sparse_tvm.serving.protocol` checks every byte of it), the
:mod:`~sparse_tvm.serving.repository` finds the loaded :mod:`~sparse_tvm.serving.version`, whose
:mod:`~sparse_tvm.serving.queueing` holds it until a :mod:`~sparse_tvm.serving.worker` process is
free, :mod:`~sparse_tvm.serving.batching` joins it with others, and
:mod:`~sparse_tvm.serving.process` hands the tensors over in shared memory.

Importing this package imports none of the extra ``serve``; worker processes need NumPy and TVM's
runtime only.
"""
