"""meshwright: plan, prove, run and diagnose hybrid parallelism of large language models."""
