"""Serving a plan with vLLM: its exact arguments (`arguments`, `refusals`), its launch (`server`, `failures`), the ranks
that it formed (`ranks`), and clients that check and load it (`client`, `load`). No torch; vLLM runs beside."""

from meshwright.serving.arguments import VllmLaunch, VllmOptions, VllmProcess, vllm_launch

__all__ = ["VllmLaunch", "VllmOptions", "VllmProcess", "vllm_launch"]
