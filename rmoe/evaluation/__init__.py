"""Benchmarks through lm-evaluation-harness."""

from rmoe.evaluation.harness import Benchmark, parse_benchmarks, run_benchmarks

__all__ = ["Benchmark", "parse_benchmarks", "run_benchmarks"]
