"""The CPU backend's kernel families: all that is known of each operator's kernels.

They import no TVM but where a kernel is built.
"""
