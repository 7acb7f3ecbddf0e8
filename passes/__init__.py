"""The compiler's graph passes, one per file, over a :class:`~sparse_tvm.passes.program.Program`.

Each pass says in its docstring what it matches, what it turns it into, and why; a pass that
leaves a layer alone says why in the layer's report.
"""
