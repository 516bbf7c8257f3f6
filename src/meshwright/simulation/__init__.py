"""Event simulation of one training step: the schedule replayed with a communication stream per link.

`simulate_step(model, cluster, workload, config, stack) -> StepTimeline`; `chrome_trace(timeline)` for a trace viewer.
"""

from meshwright.simulation.chrome import chrome_trace, write_trace
from meshwright.simulation.step import simulate_step
from meshwright.simulation.timeline import Exposure, Span, StepTimeline, Stream

__all__ = ["Exposure", "Span", "StepTimeline", "Stream", "chrome_trace", "simulate_step", "write_trace"]
