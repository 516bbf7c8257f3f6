"""The dry run: the runtime's own code for any rank of a job of any size, under fake tensors and a fake process group.

It traces every collective and every live byte, compares both with the cost model, and proves that the job cannot hang
(docs/dryrun.md).
"""
