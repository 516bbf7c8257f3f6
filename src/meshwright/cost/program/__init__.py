"""The runtime's own program written down allocation by allocation, without torch: what it holds and where its peak is.

Every function here stands for one of the runtime (`meshwright.runtime`) or of the transformers module that it drives:
it makes what the operations make, keeps what autograd saves, and lets go where Python or autograd does. A `Tape`
counts. The dry run's tracker is the judge (`make dryrun-memory`, docs/dryrun.md).
"""
