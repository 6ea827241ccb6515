"""Benchmarks through lm-evaluation-harness."""

from rmoe.evaluation.harness import parse_benchmarks, run_benchmarks

__all__ = ["parse_benchmarks", "run_benchmarks"]
