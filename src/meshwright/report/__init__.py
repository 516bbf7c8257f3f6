"""Room report: what a person reads in a terminal, and the JSON documents that a program reads.

In: the dataclasses that the other rooms return. Out: rich renderables, or dicts that are strict JSON. Nothing is
computed here that costs or decides anything.
"""
