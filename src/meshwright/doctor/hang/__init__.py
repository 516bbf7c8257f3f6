"""Who hangs, and in what: the flight logs of all ranks joined, the first disagreement or the root of the waiting named.

`evidence` joins the logs, `mismatch` finds where members of a group called different things, `waits` walks from rank to
rank that waits for another, `slow` compares the ranks' own time per step, `failures` sorts the errors of ranks,
`verdict` decides and says it in a sentence.
"""

from meshwright.doctor.hang.evidence import Evidence
from meshwright.doctor.hang.finding import Cause, Verdict
from meshwright.doctor.hang.verdict import diagnose_hang, diagnose_logs

__all__ = ["Cause", "Evidence", "Verdict", "diagnose_hang", "diagnose_logs"]
